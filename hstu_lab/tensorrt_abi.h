// What a plugin and TensorRT 8 call of each other, laid out in memory as libnvinfer.so.8 lays it out. NVIDIA's header is on no
// package index; only the order of virtual functions, the signatures and the sizes below matter, and they are those of 8.5 and 8.6.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nvinfer1
{

constexpr int32_t VERSION = 8600;

enum class DataType : int32_t { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3 };
enum class TensorFormat : int32_t { LINEAR = 0 };

struct Dims
{
    int32_t count;
    int32_t size[8];
};

struct TensorDesc
{
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicTensorDesc
{
    TensorDesc desc;
    Dims least, most;
};

struct Root
{
    virtual ~Root() noexcept = default;
};

class Expression;

struct ExpressionMaker : Root
{
    virtual Expression const* constant(int32_t value) = 0;
};

// Seen from outside it has a table of virtual functions (a destructor), then the object that does the work.
class ExpressionBuilder
{
public:
    Expression const* constant(int32_t value) noexcept { return maker->constant(value); }

protected:
    ExpressionMaker* maker;
    virtual ~ExpressionBuilder() noexcept = default;
};

struct DimsExpressions
{
    int32_t count;
    Expression const* size[8];
};

struct Field
{
    char const* name;
    void const* data;
    enum class Type : int32_t { CHAR = 6 } type;
    int32_t length;
};

struct Fields
{
    int32_t count;
    Field const* fields;
};

// The first generation of plugins; TensorRT calls of it what later ones do not replace.
struct PluginV2
{
    virtual int32_t getTensorRTVersion() const noexcept { return VERSION; }
    virtual char const* getPluginType() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual Dims getOutputDimensions(int32_t, Dims const*, int32_t) noexcept = 0;
    virtual bool supportsFormat(DataType, TensorFormat) const noexcept = 0;
    virtual void configureWithFormat(Dims const*, int32_t, Dims const*, int32_t, DataType, TensorFormat, int32_t) noexcept = 0;
    virtual int32_t initialize() noexcept = 0;
    virtual void terminate() noexcept = 0;
    virtual size_t getWorkspaceSize(int32_t) const noexcept = 0;
    virtual int32_t enqueue(int32_t, void const* const*, void* const*, void*, void*) noexcept = 0;
    virtual size_t getSerializationSize() const noexcept = 0;
    virtual void serialize(void*) const noexcept = 0;
    virtual void destroy() noexcept = 0;
    virtual PluginV2* clone() const noexcept = 0;
    virtual void setPluginNamespace(char const*) noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
    virtual ~PluginV2() noexcept = default;
};

struct PluginV2Ext : PluginV2
{
    virtual DataType getOutputDataType(int32_t, DataType const*, int32_t) const noexcept = 0;
    virtual bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept = 0;
    virtual bool canBroadcastInputAcrossBatch(int32_t) const noexcept = 0;
    virtual void configurePlugin(Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*,
        bool const*, TensorFormat, int32_t) noexcept = 0;
    virtual void attachToContext(void*, void*, void*) noexcept {}
    virtual void detachFromContext() noexcept {}
    void configureWithFormat(Dims const*, int32_t, Dims const*, int32_t, DataType, TensorFormat, int32_t) noexcept override {}
};

struct PluginV2Dynamic : PluginV2Ext
{
    virtual DimsExpressions getOutputDimensions(int32_t, DimsExpressions const*, int32_t, ExpressionBuilder&) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t, TensorDesc const*, int32_t, int32_t) noexcept = 0;
    virtual void configurePlugin(DynamicTensorDesc const*, int32_t, DynamicTensorDesc const*, int32_t) noexcept = 0;
    virtual size_t getWorkspaceSize(TensorDesc const*, int32_t, TensorDesc const*, int32_t) const noexcept = 0;
    virtual int32_t enqueue(TensorDesc const*, TensorDesc const*, void const* const*, void* const*, void*, void*) noexcept = 0;

    int32_t getTensorRTVersion() const noexcept override { return 3 << 24 | VERSION; }

private:  // of the generations before
    Dims getOutputDimensions(int32_t, Dims const*, int32_t) noexcept final { return {-1, {}}; }
    bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept final { return false; }
    bool canBroadcastInputAcrossBatch(int32_t) const noexcept final { return true; }
    bool supportsFormat(DataType, TensorFormat) const noexcept final { return false; }
    void configurePlugin(Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*,
        bool const*, TensorFormat, int32_t) noexcept final {}
    size_t getWorkspaceSize(int32_t) const noexcept final { return 0; }
    int32_t enqueue(int32_t, void const* const*, void* const*, void*, void*) noexcept final { return 1; }
};

struct PluginCreator
{
    virtual int32_t getTensorRTVersion() const noexcept { return VERSION; }
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual Fields const* getFieldNames() noexcept = 0;
    virtual PluginV2* createPlugin(char const*, Fields const*) noexcept = 0;
    virtual PluginV2* deserializePlugin(char const*, void const*, size_t) noexcept = 0;
    virtual void setPluginNamespace(char const*) noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
    virtual ~PluginCreator() = default;
};

struct PluginRegistry
{
    virtual bool registerCreator(PluginCreator&, char const*) noexcept = 0;
};

}  // namespace nvinfer1

// TensorRT plugin "CompiledKernel": launches one kernel that was compiled ahead of time, through CUDA's driver.
//
// Two texts say everything. `cubin`: the machine code in hexadecimal. `launch`: a line a fact,
//     kernel NAME | threads N | shared BYTES | grid X Y Z | in TYPE... | out TYPE DIM... | arg KIND VALUE
// where a number is A, A:B or A:B/C*D, which stands for A + D * ceil(B * rows of the first input / C), and an argument is one of
//     in INDEX BYTES | out INDEX | i32 NUMBER | f32 NUMBER | null
//     map INDEX BYTES ROWS COLUMNS STRIDE BOX_ROWS BOX_COLUMNS SWIZZLE SIZE
// A map describes a matrix to the tensor memory accelerator (compute capability 9 and up): elements of SIZE bytes, halves (2) or
// int8 (1), STRIDE of them a row.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tensorrt_abi.h"

namespace
{

using namespace nvinfer1;

// ---- CUDA's driver, found when the first kernel is loaded: engines are described where there is no GPU, too

struct Driver
{
    int (*loadModule)(void**, void const*);
    int (*getFunction)(void**, void*, char const*);
    int (*setAttribute)(void*, int, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*unload)(void*);
    int (*encodeMap)(void*, int, unsigned, void*, uint64_t const*, uint64_t const*, uint32_t const*, uint32_t const*, int, int,
        int, int);
    int (*errorName)(int, char const**);

    static Driver const* get()
    {
        static Driver driver;
        static bool const found = [] {
            void* library = dlopen("libcuda.so.1", RTLD_NOW);
            return library && find(library, "cuModuleLoadData", driver.loadModule)
                && find(library, "cuModuleGetFunction", driver.getFunction)
                && find(library, "cuFuncSetAttribute", driver.setAttribute) && find(library, "cuLaunchKernel", driver.launch)
                && find(library, "cuModuleUnload", driver.unload)
                && find(library, "cuTensorMapEncodeTiled", driver.encodeMap)
                && find(library, "cuGetErrorName", driver.errorName);
        }();
        return found ? &driver : nullptr;
    }

private:
    template <typename F>
    static bool find(void* library, char const* name, F& function)
    {
        function = reinterpret_cast<F>(dlsym(library, name));
        return function != nullptr;
    }
};

bool failed(char const* what, std::string const& kernel, int status)
{
    if (status == 0)
        return false;
    char const* name = "no driver";
    if (auto driver = Driver::get())
        driver->errorName(status, &name);
    std::fprintf(stderr, "CompiledKernel %s: %s failed: %s\n", kernel.c_str(), what, name);
    return true;
}

// ---- what a launch text says

using Words = std::vector<std::string>;

struct Number
{
    int64_t fixed = 0, each = 0, share = 1, times = 1;

    int64_t at(int32_t rows) const { return fixed + times * ((each * rows + share - 1) / share); }

    bool parse(std::string const& word)
    {
        char* end = nullptr;
        fixed = std::strtoll(word.c_str(), &end, 10);
        if (*end == ':')
            each = std::strtoll(end + 1, &end, 10);
        if (*end == '/')
            share = std::strtoll(end + 1, &end, 10);
        if (*end == '*')
            times = std::strtoll(end + 1, &end, 10);
        return !word.empty() && *end == '\0' && share > 0 && times > 0;
    }
};

struct Output
{
    DataType type;
    std::vector<Number> dims;
};

struct Argument
{
    enum Kind { IN, OUT, I32, F32, MAP, NOTHING } kind;
    size_t index = 0;
    Number number;
    float real = 0;
    Number rows, columns, stride, boxRows, boxColumns, swizzle, size;
};

bool typeOf(std::string const& name, DataType& type)
{
    static std::map<std::string, DataType> const types{
        {"float", DataType::FLOAT}, {"half", DataType::HALF}, {"int8", DataType::INT8}, {"int32", DataType::INT32}};
    auto found = types.find(name);
    if (found == types.end())
        return false;
    type = found->second;
    return true;
}

struct Launch
{
    std::string kernel;
    Number threads, shared, grid[3];
    std::vector<DataType> inputs;
    std::vector<Output> outputs;
    std::vector<Argument> arguments;

    bool parse(std::string const& text)
    {
        for (size_t start = 0, end; start < text.size(); start = end + 1)
        {
            end = std::min(text.find('\n', start), text.size());
            auto line = text.substr(start, end - start);
            if (!parseLine(split(line)))
            {
                std::fprintf(stderr, "CompiledKernel: cannot read the launch line '%s'\n", line.c_str());
                return false;
            }
        }
        for (auto const& argument : arguments)
            if (argument.index >= (argument.kind == Argument::OUT ? outputs.size() : inputs.size()))
                return false;
        return !kernel.empty() && threads.fixed > 0 && !inputs.empty() && !outputs.empty()
            && arguments.size() <= MOST_ARGUMENTS
            && std::count_if(arguments.begin(), arguments.end(), [](auto const& a) { return a.kind == Argument::MAP; })
                <= static_cast<long>(MOST_MAPS);
    }

    static constexpr size_t MOST_ARGUMENTS = 64, MOST_MAPS = 4;

private:
    // Not through a stream: where a process holds two C++ libraries, streams of one cannot read numbers with the other's.
    static Words split(std::string const& line)
    {
        Words words;
        for (size_t at = 0, end; (at = line.find_first_not_of(' ', at)) != std::string::npos; at = end)
        {
            end = std::min(line.find(' ', at), line.size());
            words.push_back(line.substr(at, end - at));
        }
        return words;
    }

    bool parseLine(Words const& words)
    {
        auto size = words.size();
        if (size < 2)
            return false;
        auto const& what = words[0];
        if (what == "kernel")
            kernel = words[1];
        else if (what == "threads")
            return threads.parse(words[1]);
        else if (what == "shared")
            return shared.parse(words[1]);
        else if (what == "grid")
            return size == 4 && grid[0].parse(words[1]) && grid[1].parse(words[2]) && grid[2].parse(words[3]);
        else if (what == "in")
        {
            inputs.resize(size - 1);
            for (size_t i = 1; i < size; ++i)
                if (!typeOf(words[i], inputs[i - 1]))
                    return false;
        }
        else if (what == "out")
        {
            Output output;
            output.dims.resize(size - 2);
            for (size_t i = 2; i < size; ++i)
                if (!output.dims[i - 2].parse(words[i]))
                    return false;
            if (size < 3 || size > 10 || !typeOf(words[1], output.type))
                return false;
            outputs.push_back(output);
        }
        else
            return what == "arg" && parseArgument(words);
        return true;
    }

    bool parseArgument(Words const& words)
    {
        static std::map<std::string, std::pair<Argument::Kind, size_t>> const kinds{{"in", {Argument::IN, 4}},
            {"out", {Argument::OUT, 3}}, {"i32", {Argument::I32, 3}}, {"f32", {Argument::F32, 3}},
            {"map", {Argument::MAP, 11}}, {"null", {Argument::NOTHING, 2}}};
        auto found = kinds.find(words[1]);
        if (found == kinds.end() || words.size() != found->second.second)
            return false;
        Argument argument{};
        argument.kind = found->second.first;
        bool const onTensor = argument.kind == Argument::IN || argument.kind == Argument::MAP;
        if (onTensor || argument.kind == Argument::OUT)
            argument.index = std::strtoul(words[2].c_str(), nullptr, 10);
        if (argument.kind == Argument::F32)
            argument.real = std::strtof(words[2].c_str(), nullptr);
        if ((onTensor && !argument.number.parse(words[3])) || (argument.kind == Argument::I32 && !argument.number.parse(words[2])))
            return false;
        Number* const parts[]{&argument.rows, &argument.columns, &argument.stride, &argument.boxRows, &argument.boxColumns,
            &argument.swizzle, &argument.size};
        for (size_t i = 0; argument.kind == Argument::MAP && i < 7; ++i)
            if (!parts[i]->parse(words[4 + i]))
                return false;
        arguments.push_back(argument);
        return true;
    }
};

// ---- what the tensor memory accelerator reads by

struct alignas(64) TensorMap
{
    unsigned char bytes[128];
};

bool encode(TensorMap& map, Argument const& argument, void const* address, int32_t batch, std::string const& kernel)
{
    constexpr int BYTE = 0, HALF = 6, PLAIN = 0, L2_128_BYTES = 2;
    uint64_t const dims[]{static_cast<uint64_t>(argument.columns.at(batch)), static_cast<uint64_t>(argument.rows.at(batch))};
    uint64_t const strides[]{argument.size.fixed * static_cast<uint64_t>(argument.stride.at(batch)), 0};
    uint32_t const box[]{static_cast<uint32_t>(argument.boxColumns.fixed), static_cast<uint32_t>(argument.boxRows.fixed)};
    uint32_t const steps[]{1, 1};
    auto start = const_cast<char*>(static_cast<char const*>(address)) + argument.number.at(batch);
    return !failed("describing a tensor", kernel,
        Driver::get()->encodeMap(&map, argument.size.fixed == 1 ? BYTE : HALF, 2, start, dims, strides, box, steps, PLAIN,
            static_cast<int>(argument.swizzle.fixed), L2_128_BYTES, PLAIN));
}

// ---- machine code on the GPU, shared by all layers that run it

struct Loaded
{
    void *module = nullptr, *function = nullptr;

    ~Loaded()
    {
        if (module && Driver::get())
            Driver::get()->unload(module);
    }
};

std::shared_ptr<Loaded> load(Launch const& launch, std::string const& cubin)
{
    static std::mutex mutex;
    static std::map<std::string, std::weak_ptr<Loaded>> known;
    std::lock_guard<std::mutex> guard(mutex);
    auto& entry = known[launch.kernel + ' ' + cubin];
    if (auto loaded = entry.lock())
        return loaded;
    auto driver = Driver::get();
    if (!driver)
    {
        std::fprintf(stderr, "CompiledKernel %s: no NVIDIA driver here\n", launch.kernel.c_str());
        return nullptr;
    }
    std::string code(cubin.size() / 2, '\0');
    for (size_t i = 0; i < code.size(); ++i)
        code[i] = static_cast<char>(std::stoi(cubin.substr(2 * i, 2), nullptr, 16));
    auto loaded = std::make_shared<Loaded>();
    constexpr int MOST_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (failed("loading the code", launch.kernel, driver->loadModule(&loaded->module, code.data()))
        || failed("finding the kernel", launch.kernel,
            driver->getFunction(&loaded->function, loaded->module, launch.kernel.c_str()))
        || failed("asking for shared memory", launch.kernel,
            driver->setAttribute(loaded->function, MOST_SHARED, static_cast<int>(launch.shared.fixed))))
        return nullptr;
    entry = loaded;
    return loaded;
}

char const* const NAME = "CompiledKernel";
char const* const PLUGIN_VERSION = "1";

class Plugin : public PluginV2Dynamic
{
public:
    Plugin(std::string launchText, std::string code, bool inEngine)
        : text(std::move(launchText)), cubin(std::move(code)), runs(inEngine)
    {
        valid = launch.parse(text) && !cubin.empty() && cubin.size() % 2 == 0
            && cubin.find_first_not_of("0123456789abcdef") == std::string::npos;
    }

    bool valid;

    char const* getPluginType() const noexcept override { return NAME; }
    char const* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(launch.outputs.size()); }
    void setPluginNamespace(char const* name) noexcept override { space = name; }
    char const* getPluginNamespace() const noexcept override { return space.c_str(); }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    PluginV2* clone() const noexcept override { return new Plugin(*this); }
    size_t getSerializationSize() const noexcept override { return text.size() + 1 + cubin.size(); }

    void serialize(void* buffer) const noexcept override
    {
        std::memcpy(buffer, (text + '\0' + cubin).data(), getSerializationSize());
    }

    int32_t initialize() noexcept override
    {
        loaded = load(launch, cubin);
        return loaded ? 0 : 1;
    }

    // A network knows only float and int32; which are halves is settled by supportsFormatCombination.
    DataType getOutputDataType(int32_t index, DataType const*, int32_t) const noexcept override
    {
        auto type = launch.outputs[index].type;
        return type == DataType::INT32 ? type : DataType::FLOAT;
    }

    DimsExpressions getOutputDimensions(
        int32_t index, DimsExpressions const* inputs, int32_t, ExpressionBuilder& build) noexcept override
    {
        DimsExpressions dims{};
        for (auto const& dim : launch.outputs[index].dims)  // A:B is written as 0:1 there
            dims.size[dims.count++] = dim.each ? inputs[0].size[0] : build.constant(static_cast<int32_t>(dim.fixed));
        return dims;
    }

    bool supportsFormatCombination(int32_t at, TensorDesc const* all, int32_t inputs, int32_t outputs) noexcept override
    {
        if (inputs != static_cast<int32_t>(launch.inputs.size()) || outputs != static_cast<int32_t>(launch.outputs.size()))
            return false;
        auto wanted = at < inputs ? launch.inputs[at] : launch.outputs[at - inputs].type;
        return all[at].format == TensorFormat::LINEAR && all[at].type == wanted;
    }

    void configurePlugin(DynamicTensorDesc const*, int32_t, DynamicTensorDesc const*, int32_t) noexcept override {}

    size_t getWorkspaceSize(TensorDesc const*, int32_t, TensorDesc const*, int32_t) const noexcept override { return 0; }

    int32_t enqueue(TensorDesc const* described, TensorDesc const*, void const* const* inputs, void* const* outputs, void*,
        void* stream) noexcept override
    {
        if (!loaded && initialize() != 0)
            return 1;
        if (!runs)  // a builder times layers on memory that holds anything, lengths and offsets too
            return 0;
        auto rows = described[0].dims.size[0];
        uint64_t values[Launch::MOST_ARGUMENTS];
        void* pointers[Launch::MOST_ARGUMENTS];
        TensorMap maps[Launch::MOST_MAPS];
        size_t count = 0, mapped = 0;
        for (auto const& argument : launch.arguments)
        {
            if (argument.kind == Argument::MAP)
            {
                if (!encode(maps[mapped], argument, inputs[argument.index], rows, launch.kernel))
                    return 1;
                pointers[count++] = &maps[mapped++];
                continue;
            }
            uint64_t value = 0;
            switch (argument.kind)
            {
            case Argument::IN:
                value = reinterpret_cast<uint64_t>(inputs[argument.index]) + argument.number.at(rows);
                break;
            case Argument::OUT: value = reinterpret_cast<uint64_t>(outputs[argument.index]); break;
            case Argument::I32: value = static_cast<uint32_t>(argument.number.at(rows)); break;
            case Argument::F32: std::memcpy(&value, &argument.real, sizeof argument.real); break;
            case Argument::MAP:
            case Argument::NOTHING: break;
            }
            values[count] = value;
            pointers[count] = &values[count];
            ++count;
        }
        auto const* grid = launch.grid;
        return failed("launching", launch.kernel,
            Driver::get()->launch(loaded->function, grid[0].at(rows), grid[1].at(rows), grid[2].at(rows), launch.threads.fixed, 1, 1,
                launch.shared.fixed, stream, pointers, nullptr));
    }

private:
    std::string text, cubin, space;
    bool runs;
    Launch launch;
    std::shared_ptr<Loaded> loaded;
};

PluginV2* made(std::string text, std::string cubin, bool inEngine)
{
    auto plugin = new Plugin(std::move(text), std::move(cubin), inEngine);
    if (plugin->valid)
        return plugin;
    delete plugin;
    return nullptr;
}

class Creator : public PluginCreator
{
public:
    char const* getPluginName() const noexcept override { return NAME; }
    char const* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
    void setPluginNamespace(char const* name) noexcept override { space = name; }
    char const* getPluginNamespace() const noexcept override { return space.c_str(); }

    Fields const* getFieldNames() noexcept override
    {
        static Field const fields[]{{"launch", nullptr, Field::Type::CHAR, 0}, {"cubin", nullptr, Field::Type::CHAR, 0}};
        static Fields const all{2, fields};
        return &all;
    }

    PluginV2* createPlugin(char const*, Fields const* given) noexcept override
    {
        std::string text, cubin;
        for (int32_t i = 0; i < given->count; ++i)
        {
            auto const& field = given->fields[i];
            std::string value(static_cast<char const*>(field.data), field.length);
            value.resize(std::strlen(value.c_str()));  // some callers count the end of the text
            (std::string(field.name) == "cubin" ? cubin : text) = value;
        }
        return made(text, cubin, false);
    }

    PluginV2* deserializePlugin(char const*, void const* data, size_t length) noexcept override
    {
        std::string all(static_cast<char const*>(data), length);
        auto end = all.find('\0');
        return end == std::string::npos ? nullptr : made(all.substr(0, end), all.substr(end + 1), true);
    }

private:
    std::string space;
};

}  // namespace

// Makes the plugin known to the TensorRT whose registry is given; false where it knows one of that name.
extern "C" bool hstu_lab_register(void* registry)
{
    static Creator creator;
    return static_cast<PluginRegistry*>(registry)->registerCreator(creator, "");
}

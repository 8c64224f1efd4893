"""The plugin, compiled here and called as TensorRT 8 calls it, by a C++ program that holds the registry."""

import os
import subprocess
import types

import pytest

from hstu_lab import tensorrt_plugin
from hstu_lab.tensorrt_build import BuildError, take_kernels
from hstu_lab.tensorrt_plugin import PluginError, compile_plugin, register

CALLER = r"""
#include <dlfcn.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include "tensorrt_abi.h"
namespace nvinfer1 { class Expression { public: int value; }; }
using namespace nvinfer1;

struct Registry : PluginRegistry
{
    PluginCreator* creator = nullptr;
    bool registerCreator(PluginCreator& given, char const* space) noexcept override
    {
        if (creator || std::strlen(space)) return false;
        creator = &given;
        return true;
    }
};
struct Maker : ExpressionMaker
{
    std::vector<Expression*> made;
    Expression const* constant(int32_t value) override { made.push_back(new Expression{value}); return made.back(); }
};
struct Builder : ExpressionBuilder { Maker own; Builder() { maker = &own; } };

int main(int argc, char** argv)
{
    auto library = dlopen(argv[1], RTLD_NOW);
    auto enter = reinterpret_cast<bool (*)(void*)>(dlsym(library, "hstu_lab_register"));
    Registry registry;
    bool once = enter(&registry), twice = enter(&registry);
    std::printf("%d %d\n", once, twice);
    auto creator = registry.creator;
    std::string launch = argv[2], cubin = argv[3];
    Field fields[]{{"launch", launch.data(), Field::Type::CHAR, int(launch.size())},
        {"cubin", cubin.data(), Field::Type::CHAR, int(cubin.size())}};
    Fields all{2, fields};
    auto names = creator->getFieldNames();
    std::printf("%s %s %d %s %s\n", creator->getPluginName(), creator->getPluginVersion(), names->count,
        names->fields[0].name, names->fields[1].name);
    auto first = static_cast<PluginV2Dynamic*>(creator->createPlugin("x", &all));
    if (!first) { std::printf("refused\n"); return 0; }
    std::string stored(first->getSerializationSize(), '\0');
    first->serialize(stored.data());
    auto read = static_cast<PluginV2Dynamic*>(creator->deserializePlugin("x", stored.data(), stored.size()));
    auto plugin = static_cast<PluginV2Dynamic*>(read->clone());
    first->destroy();
    read->destroy();
    std::string again(plugin->getSerializationSize(), '\0');
    plugin->serialize(again.data());
    std::printf("%d %x %d\n", again == stored, plugin->getTensorRTVersion(), plugin->getNbOutputs());
    Builder builder;
    Expression rows{77};
    DimsExpressions input{3, {&rows}};
    for (int i = 0; i < plugin->getNbOutputs(); ++i)
    {
        auto dims = static_cast<PluginV2Dynamic*>(plugin)->getOutputDimensions(i, &input, 1, builder);
        std::printf("out %d:", static_cast<int>(plugin->getOutputDataType(i, nullptr, 0)));
        for (int d = 0; d < dims.count; ++d) std::printf(" %d", dims.size[d]->value);
        std::printf("\n");
    }
    TensorDesc tensors[4]{};
    DataType kinds[]{DataType::HALF, DataType::INT32, DataType::HALF, DataType::INT32};
    for (int i = 0; i < 4; ++i) tensors[i].type = kinds[i];
    for (int i = 0; i < 4; ++i)
    {
        bool right = plugin->supportsFormatCombination(i, tensors, 2, 2);
        tensors[i].type = DataType::FLOAT;
        bool wrong = plugin->supportsFormatCombination(i, tensors, 2, 2);
        tensors[i].type = kinds[i];
        std::printf("%d%d ", right, wrong);
    }
    std::printf("%d\n", plugin->supportsFormatCombination(0, tensors, 1, 2));
    std::printf("initialize %d\n", plugin->initialize());
    if (argc > 4)
    {
        tensors[0].dims = {3, {std::atoi(argv[4]), 5, 6}};
        void const* inputs[]{reinterpret_cast<void*>(0x1000), reinterpret_cast<void*>(0x2000)};
        void* outputs[]{reinterpret_cast<void*>(0x3000), reinterpret_cast<void*>(0x4000)};
        std::printf("enqueue %d\n", plugin->enqueue(tensors, tensors + 2, inputs, outputs, nullptr, nullptr));
    }
    plugin->destroy();
}
"""
DRIVER = r"""
#include <cstdint>
#include <cstdio>
#include <cstring>
// Says what it is asked for.
extern "C" int cuModuleLoadData(void** module, void const* code)
{
    std::printf("code %x\n", *static_cast<unsigned char const*>(code));
    *module = module;
    return 0;
}
extern "C" int cuModuleGetFunction(void** function, void*, char const* name)
{
    std::printf("find %s\n", name);
    *function = function;
    return 0;
}
extern "C" int cuFuncSetAttribute(void*, int what, int value)
{
    std::printf("attribute %d %d\n", what, value);
    return 0;
}
extern "C" int cuModuleUnload(void*)
{
    return 0;
}
extern "C" int cuGetErrorName(int, char const** name)
{
    *name = "an error";
    return 0;
}
extern "C" int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* start, uint64_t const* dims,
    uint64_t const* strides, uint32_t const* box, uint32_t const* steps, int, int swizzle, int, int)
{
    std::printf("map type %d at %lx: %lu x %lu, %lu bytes a row, box %u x %u, steps %u %u, swizzle %d\n", type,
        (long)start, dims[1], dims[0], strides[0], box[1], box[0], steps[0], steps[1], swizzle);
    std::memset(map, type + 1, rank);
    return 0;
}
extern "C" int cuLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
    void*, void** values, void**)
{
    float real;
    std::memcpy(&real, values[5], 4);
    std::printf("launch %u %u %u threads %u shared %u: %lx map %d map %d %lx %d %g %lx\n", x, y, z, threads, shared,
        *static_cast<long*>(values[0]), *static_cast<char*>(values[1]), *static_cast<char*>(values[2]),
        *static_cast<long*>(values[3]), *static_cast<int*>(values[4]), real, *static_cast<long*>(values[6]));
    return x > 40;
}
"""
LAUNCH = """kernel k
threads 128
shared 0
grid 0:3/2*5 1 1
in half int32
out half 0:1 5 6
out int32 0:1 2
arg in 0 16
arg map 0 0 0:8 64 64 16 32 3 2
arg map 0 4 7 96 128 16 32 2 1
arg out 1
arg i32 2:7
arg f32 0.125
arg null"""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs the caller with a launch text and code; its lines. Both are compiled here."""
    folder = tmp_path_factory.mktemp("plugin")
    os.environ["HSTU_LAB_KERNELS"] = str(folder)
    try:
        plugin = compile_plugin()
    finally:
        del os.environ["HSTU_LAB_KERNELS"]
    (folder / "caller.cpp").write_text(CALLER)
    command = ["c++", "-std=c++17", "-Wall", f"-I{tensorrt_plugin.SOURCES}", "caller.cpp", "-o", "caller", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)

    (folder / "driver.cpp").write_text(DRIVER)
    (folder / "driver").mkdir()
    subprocess.run(["c++", "-shared", "-fPIC", "driver.cpp", "-o", "driver/libcuda.so.1"], cwd=folder, check=True)

    def run(launch=LAUNCH, cubin="00ff" * 8, batch=None):
        arguments, found = ([], {}) if batch is None else ([str(batch)], {"LD_LIBRARY_PATH": str(folder / "driver")})
        command = [folder / "caller", plugin, launch, cubin, *arguments]
        said = subprocess.run(command, capture_output=True, text=True, env=os.environ | found)
        assert said.returncode == 0, said
        return said.stdout.splitlines(), said.stderr

    return run


def test_tensorrt_sees_the_plugin_that_the_texts_describe(call):
    lines, errors = call()
    assert lines[:2] == ["1 0", "CompiledKernel 1 2 launch cubin"], "known once, refused the second time"
    assert lines[2] == "1 3002198 2", "the same after being stored, read and cloned; generation 3, version 8.6.0"
    assert lines[3:5] == ["out 0: 77 5 6", "out 3: 77 2"], "a batch as free as the first input's"
    assert lines[5] == "10 10 10 10 0", "exactly the types of the text, and as many tensors"
    assert lines[6] in ("initialize 1", "initialize 0")
    assert "no NVIDIA driver" in errors or lines[6] == "initialize 0" or "failed" in errors


def test_a_launch_is_what_the_text_says_for_that_batch(call):
    """With a driver that prints what it is asked for in CUDA's place."""
    lines, _ = call(batch=9, launch=LAUNCH.replace("shared 0", "shared 99"))
    assert lines[-7:] == [
        "find k",
        "attribute 8 99",
        "initialize 0",
        "map type 6 at 1000: 72 x 64, 128 bytes a row, box 16 x 32, steps 1 1, swizzle 3",
        "map type 0 at 1004: 7 x 96, 128 bytes a row, box 16 x 32, steps 1 1, swizzle 2",
        "launch 70 1 1 threads 128 shared 99: 1010 map 7 map 1 4000 65 0.125 0",
        "enqueue 1",
    ], "three blocks for two histories, five times: 14 times 5"
    assert lines[-8].endswith("code 0")
    lines, errors = call(batch=5)
    assert lines[-1] == "enqueue 0"
    assert "launch 40 1 1" in lines[-2], "an odd batch's last block is begun"
    assert "CompiledKernel k" not in errors


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threads 128", "threads many"), ("in half int32", "in half int4"), ("arg in 0 16", "arg in 2 16"),
        ("arg out 1", "arg out 2"), ("arg null", "arg nil"), ("grid 0:3/2*5 1 1", "grid 0:3/2*5 1"), ("kernel k", "kernel"),
        ("0:3/2*5", "0:3/0*5"), ("0:3/2*5", "0:3/2*"),
        ("out half 0:1 5 6", "out half 0:1 5 x"), ("arg map 0 0 0:8 64 64 16 32 3 2", "arg map 0 0 0:8 64"),
        ("shared 0\n", "shared 0\nwhat is this\n"), ("threads 128", "threads 0"), ("arg null", "arg null\n" * 70),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_is_refused(call, old, new):
    assert old in LAUNCH
    assert call(LAUNCH.replace(old, new))[0][-1] == "refused"


@pytest.mark.parametrize("cubin", ["", "abc", "0g"])
def test_code_that_is_none_is_refused(call, cubin):
    assert call(cubin=cubin)[0][-1] == "refused"


def test_a_library_that_takes_no_such_plugin_says_so():
    for version, rtx in (("10.8.0", False), ("1.7.1", True)):
        library = types.SimpleNamespace(is_rtx=rtx, version=version, label=f"TensorRT {version}", name="x")
        with pytest.raises(PluginError, match=rf"TensorRT {version} cannot run compiled kernels of ours; TensorRT 8"):
            register.__wrapped__(library)


def test_kernels_of_another_gpu_are_refused_by_name():
    with pytest.raises(BuildError, match=r"stack.onnx: holds kernels compiled for sm_90, the engine is for sm_80; export"):
        take_kernels("stack.onnx", {"kernels": "sm_90"}, None, "sm_80")
    take_kernels("stack.onnx", {}, None, "sm_80")


def test_a_missing_or_refusing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HSTU_LAB_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PluginError, match="no C\\+\\+ compiler here: install g\\+\\+"):
        compile_plugin()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(PluginError, match="false refuses the plugin"):
        compile_plugin()
    assert not list((tmp_path / "kernels").iterdir()), "nothing broken is left"

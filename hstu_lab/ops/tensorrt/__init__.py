"""C++ source of the TensorRT plugin; `hstu_lab.tensorrt_plugin` compiles it."""

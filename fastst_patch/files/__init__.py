"""One open safetensors file: its tensors by maps, by reads, and on CUDA devices."""

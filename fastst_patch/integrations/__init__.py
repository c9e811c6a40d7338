"""Integrations with libraries that need more than safetensors' own names: a module for each.

This table says which functions they wrap, and in which versions of the packages they were tested.
Each module says why, and which cases it leaves to the original; it is imported at the first call.
A function whose parameters differ from the expected ones is not wrapped. A wrapped function must
return what the original returns; it passes unusual calls on to the original unchanged.
"""

from __future__ import annotations

from . import own_processes
from .hook import Fast, Hook, Integration, Late

__all__ = ["INTEGRATIONS", "Fast", "Hook", "Integration", "Late"]


def _torch(name: str, fast: str, *parameters: str) -> Hook:
    late = Late("integrations.torch_module", fast)
    return Hook("torch", "torch.nn.modules.module", name, late, parameters)


def _transformers(name: str, fast: str, *parameters: str, elsewhere: bool = True) -> Hook:
    late = Late("integrations.transformers", fast)
    module = "transformers.core_model_loading"
    return Hook("transformers", module, name, late, parameters, elsewhere)


def _vllm(module: str, name: str, fast: str, *parameters: str) -> Hook:
    late = Late("integrations.vllm", fast)
    return Hook("vllm", f"vllm.model_executor.model_loader.{module}", name, late, parameters)


def _sglang(module: str, name: str, fast: str, *parameters: str) -> Hook:
    late = Late("integrations.sglang", fast)
    return Hook("sglang", f"sglang.srt.model_loader.{module}", name, late, parameters)


INTEGRATIONS: tuple[Integration, ...] = (
    Integration(
        "torch.nn.Module.to",
        "CPU tensors of a module go to CUDA through the pinned ring, in parallel",
        ("torch", "2.4.0", "2.15.0"),
        (
            _torch("Module.to", "to", "self"),
            _torch("Module.cuda", "cuda", "self", "device"),
            _torch("Module._apply", "apply", "self", "fn"),
        ),
    ),
    Integration(
        "transformers.from_pretrained",
        "weights go from storage to their device, in the order the model takes them",
        ("transformers", "5.0.0", "5.24.0"),
        (
            _transformers("convert_and_load_state_dict_in_model", "convert_and_load",
                          "model", "state_dict", "load_config"),
            _transformers("spawn_materialize", "spawn_materialize",
                          "thread_pool", "tensor", "device", "dtype"),
            _transformers("deepcopy", "deepcopy", "x", elsewhere=False),
        ),
    ),
    Integration(
        "diffusers.from_pretrained",
        "with a device_map, weights go to their devices through the pinned ring, in parallel",
        ("diffusers", "0.36.0", "0.42.1"),
        (
            Hook("diffusers", "diffusers.models.model_loading_utils", "load_model_dict_into_meta",
                 Late("integrations.diffusers", "load_into_meta"),
                 ("model", "state_dict", "dtype")),
        ),
    ),
    Integration(
        "vllm.load",
        "weights are streamed ahead of vLLM's copies, through the pinned ring to the model's"
        " device",
        ("vllm", "0.11.2", "0.33.0"),
        (
            _vllm("weight_utils", "safetensors_weights_iterator", "weights_iterator",
                  "hf_weights_files", "use_tqdm_on_load", "safetensors_load_strategy"),
            _vllm("default_loader", "DefaultModelLoader.get_all_weights", "get_all_weights",
                  "self", "model_config", "model"),
            _vllm("default_loader", "DefaultModelLoader._get_weights_iterator",
                  "get_weights_iterator", "self", "source"),
        ),
        own_processes.of_vllm,
    ),
    Integration(
        "sglang.load",
        "weights are streamed ahead of SGLang's copies, through the pinned ring to the model's"
        " device",
        ("sglang", "0.5.11", "0.5.23"),
        (
            _sglang("weight_utils", "safetensors_weights_iterator", "weights_iterator",
                    "hf_weights_files"),
            _sglang("weight_utils", "buffered_multi_thread_safetensors_weights_iterator",
                    "weights_iterator", "hf_weights_files", "max_workers"),
            _sglang("loader", "DefaultModelLoader._get_all_weights", "get_all_weights",
                    "self", "model_config", "model"),
            _sglang("loader", "DefaultModelLoader._get_weights_iterator",
                    "get_weights_iterator", "self", "source"),
        ),
        own_processes.of_sglang,
    ),
)  # fmt: skip

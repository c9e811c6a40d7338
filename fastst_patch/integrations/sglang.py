"""SGLang: weights come from the explicit loader, on the model's own device where that is one.

    sglang.srt.plugins -> fastst_plugins.register_sglang()   in every process of SGLang
        import fastst_patch                              patches where FASTST_ENABLED says so

    DefaultModelLoader._get_all_weights(model)           -> where this load goes, noted on loader
    DefaultModelLoader._get_weights_iterator(source)     -> kept in a context variable around
    safetensors_weights_iterator(files), and
    buffered_multi_thread_safetensors_weights_iterator   -> stream, or leave it to SGLang

SGLang opens every file for the CPU and copies each tensor, from pageable memory, into its
parameter. Here the tensors are on the parameter's device when SGLang copies them. Names and bytes
are the same; the order within a file is that of the offsets.

The functions are wrapped by our own hooks. SGLang's HookRegistry imports its targets at once, in
processes that load nothing, too, and logs a traceback where that fails; it checks no signature,
cannot take a hook back, and is not there in processes that load no plug-ins.

Several ranks, and drafters, take parts of the tensors (`parts.py`). Left to SGLang, with a reason
in the report: functions with parameters that are not known. Whole tensors for quantized models,
and all for models in memory that SGLang may release, stay on the CPU. SGLang has no open list of
load formats, so there is no format of ours: options are given by the environment.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import current
from ..errors import Fallback
from .engine_load import Load, arguments, begun, destination, note, noted, streamed, within
from .engines import Wanted

if TYPE_CHECKING:
    import torch

__all__ = ["get_all_weights", "get_weights_iterator", "weights_iterator"]

_ALL = "DefaultModelLoader._get_all_weights"
_KNOWN = {
    "hf_weights_files",
    "max_workers",
    "disable_mmap",
    "prefetch",
    "prefetch_num_threads",
    "drop_cache_after_load",
}


# ---- where a load goes ----


def get_all_weights(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``DefaultModelLoader._get_all_weights``: note where this load goes."""
    with contextlib.suppress(TypeError):  # the original's to say
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        note(bound["self"], lambda: _describe(bound["model_config"], bound["model"]))
    return original(*args, **kwargs)


def get_weights_iterator(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``DefaultModelLoader._get_weights_iterator``: keep the load around it."""
    with within(noted(args[0], _ALL) if args else None):
        return original(*args, **kwargs)


def _describe(model_config: Any, model: torch.nn.Module) -> Load:
    return Load(*destination(model, lambda: _kept_on_cpu(model_config)), ranks=_ranks())


def _kept_on_cpu(model_config: Any) -> tuple[str | None, str | None]:
    """See `destination`."""
    quantized = saved = None
    if getattr(model_config, "quantization", None) is not None:
        quantized = "the model is quantized, and its conversions may differ on the device"
    if _server_args().enable_memory_saver:
        saved = "with enable_memory_saver, memory allocated while loading is kept"
    return saved or quantized, saved


def _server_args() -> Any:
    context = sys.modules.get("sglang.srt.runtime_context")  # not in 0.5.11
    if context is not None:
        return context.get_server_args()
    return sys.modules["sglang.srt.server_args"].get_global_server_args()


def _ranks() -> tuple[int, int] | None:
    """See `Load`."""
    from torch import distributed

    # All kinds of parallelism in one model: the ranks are torch's default group in each version.
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.get_rank(), distributed.get_world_size()


# ---- the iterators ----


def weights_iterator(original: Any, args: Any, kwargs: Any) -> Any:
    """For both iterators over files: stream, or leave it to SGLang."""
    """In an iterator's place: what the context says is read now, before the iterator runs."""
    load = begun(original.__name__)
    return streamed(
        "sglang",
        args[0] if args else kwargs.get("hf_weights_files", ()),
        load,
        lambda: _wanted(original, args, kwargs, load),
        functools.partial(original, *args, **kwargs),
    )


def _wanted(original: Any, args: Any, kwargs: Any, load: Load) -> Wanted:
    """A call of an iterator as we do it.

    Raises:
        Fallback: it is left to the original.
    """
    given = arguments(original, args, kwargs, load, _KNOWN)
    return Wanted(
        "sglang",
        list(given["hf_weights_files"]),
        *load.place,
        load.elements,
        progress=_shows_progress(),
        options=_options(given),
    )


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for what SGLang was told."""
    options = {}
    if given.get("disable_mmap") and current().io in ("auto", "mmap"):
        options["io"] = "buffered"
    if given.get("drop_cache_after_load"):
        if options.get("io", current().io) == "mmap":
            raise Fallback("io='mmap' leaves the files cached, and drop_cache_after_load does not")
        options["page_cache"] = "drop"
    return options


def _shows_progress() -> bool:
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0

"""vLLM: weights come from the explicit loader, on the model's own device where that is one.

    vllm.general_plugins -> fastst_plugins.register_vllm()  in every process of vLLM
        import fastst_patch                            patches where FASTST_ENABLED says so
        load format "fastst" -> loader_class()         with our options

    DefaultModelLoader.get_all_weights(model)          -> where this load goes, noted on the loader
    DefaultModelLoader._get_weights_iterator(source)   -> kept in a context variable around
    safetensors_weights_iterator(files)                -> streams, or leaves it to vLLM

vLLM opens every file for the CPU and copies each tensor, from pageable memory, into its parameter.
Here the tensors are on the parameter's device when vLLM copies them. Names and bytes are the
same; the order within a file is that of the offsets.

With tensor or pipeline parallelism, and where a model takes little of what the files have, the
tensors are views of the files' maps, as vLLM's own, and only the parts that vLLM copies are read,
to the parameter's device (`parts`). Ranks do not communicate, unless ``{"group": "tp"}`` asks for
it.

Left to vLLM, with a reason in the report: strategies other than None, ``lazy`` and ``prefetch``;
functions with parameters that are not known. With sleep mode tensors stay on the CPU, and so do
whole tensors of quantized models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import stock
from ..config import config_context, current, environment_enabled, with_options
from ..dropin import handle
from ..dropin.eligibility import report_stock
from ..errors import Fallback, OptionError
from .engine_load import (
    Load,
    arguments,
    begun,
    destination,
    fell_back_unasked,
    note,
    noted,
    streamed,
    within,
)
from .engines import Wanted

if TYPE_CHECKING:
    import torch

__all__ = [
    "format_options",
    "get_all_weights",
    "get_weights_iterator",
    "loader_class",
    "weights_iterator",
]

_UTILS = "vllm.model_executor.model_loader.weight_utils"
_ITERATOR = "safetensors_weights_iterator"
_ALL = "DefaultModelLoader.get_all_weights"
_STRATEGIES = (None, "lazy", "prefetch")
_KNOWN = {
    "hf_weights_files",
    "use_tqdm_on_load",
    "safetensors_load_strategy",
    "local_expert_ids",
    "safetensors_prefetch_num_threads",
    "safetensors_prefetch_block_size",
}
_OF_THE_PROCESS = ("fallback", "log_level")  # as in the explicit loader
_THEIRS = ("enable_weights_track",)  # keys of vLLM's that go with the load format


# ---- where a load goes ----


@dataclasses.dataclass(frozen=True)
class _FormatLoad(Load):
    """A load by the load format.

    Attributes:
        options: of ours, for this load.
        asked: called when the iterator is made.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: Callable[[], None] = lambda: None


def _note(loader: Any, model_config: Any, model: torch.nn.Module) -> None:
    """Keep on a loader of vLLM's where the load that begins goes."""
    note(loader, lambda: _describe(model_config, model))


def _describe(model_config: Any, model: torch.nn.Module) -> Load:
    return Load(
        *destination(model, lambda: _kept_on_cpu(model_config)),
        ranks=_ranks(),
        experts=_expert_ranks() > 1 and bool(getattr(model_config, "is_moe", True)),
    )


def _kept_on_cpu(model_config: Any) -> tuple[str | None, str | None]:
    """See `destination`."""
    quantized = asleep = None
    if getattr(model_config, "quantization", None) is not None:
        quantized = "the model is quantized, and its conversions may differ on the device"
    if getattr(model_config, "enable_sleep_mode", False):
        asleep = "with sleep mode, memory allocated while loading is kept"
    return asleep or quantized, asleep


def _groups() -> Any:
    """The module of vLLM's process groups, once these are made."""
    groups = sys.modules.get("vllm.distributed.parallel_state")
    made = groups is not None and groups.model_parallel_is_initialized()
    return groups if made else None


def _ranks() -> tuple[int, int] | None:
    """See `Load`. Pipeline stages take whole tensors, and skip others."""
    groups = _groups()
    if groups is None:
        return None
    size = groups.get_tensor_model_parallel_world_size()
    if size == 1 and groups.get_pp_group().world_size == 1:
        return None
    return groups.get_tensor_model_parallel_rank(), size


def _expert_ranks() -> int:
    """Ranks that share the experts, where experts are shared."""
    groups = sys.modules.get("vllm.distributed.parallel_state")
    group = getattr(groups, "_EP", None)
    return 1 if group is None else int(group.world_size)


# ---- the calls ----


def get_all_weights(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``DefaultModelLoader.get_all_weights``: note where this load goes."""
    with contextlib.suppress(TypeError):  # the original's to say
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        _note(bound["self"], bound["model_config"], bound["model"])
    return original(*args, **kwargs)


def get_weights_iterator(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``DefaultModelLoader._get_weights_iterator``: keep the load around it."""
    with within(noted(args[0], _ALL) if args else None):
        return original(*args, **kwargs)


def weights_iterator(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``safetensors_weights_iterator``: stream, or leave it to vLLM."""
    """In `safetensors_weights_iterator`'s place: what the context says is read now.

    The generator runs later, when the context is another one.
    """
    load = begun(_ITERATOR)
    if isinstance(load, _FormatLoad):
        load.asked()
    return streamed(
        "vllm",
        args[0] if args else kwargs.get("hf_weights_files", ()),
        load,
        lambda: _wanted(original, args, kwargs, load),
        lambda: _left(original, args, kwargs, load),
    )


def _left(original: Any, args: Any, kwargs: Any, load: Load) -> Iterator[tuple[str, torch.Tensor]]:
    """The loop of vLLM; for the load format, over our ``safe_open`` and with its options."""
    if not isinstance(load, _FormatLoad) or environment_enabled() is False:
        yield from original(*args, **kwargs)
        return

    def opened(*of: Any, **how: Any) -> Any:
        with config_context(**load.options):  # which is of the process: not while we are suspended
            return handle.safe_open(*of, **how)

    yield from stock.with_globals(original, safe_open=opened)(*args, **kwargs)


def _wanted(original: Any, args: Any, kwargs: Any, load: Load) -> Wanted:
    """A call of `safetensors_weights_iterator` as we do it.

    Raises:
        Fallback: it is left to the original.
    """
    given = arguments(original, args, kwargs, load, _KNOWN)
    strategy = given["safetensors_load_strategy"]
    if strategy not in _STRATEGIES:
        raise Fallback(f"safetensors_load_strategy is {strategy!r}")
    utils = sys.modules[original.__module__]
    local = given.get("local_expert_ids")
    return Wanted(
        "vllm",
        _sorted(given["hf_weights_files"], utils),
        *load.place,
        load.elements,
        None if local is None else _local_only(utils, local),
        bool(utils.enable_tqdm(given["use_tqdm_on_load"])),
        load.options if isinstance(load, _FormatLoad) else {},
    )


def _sorted(files: Sequence[str], utils: Any) -> list[str]:
    key = getattr(utils, "_natural_sort_key", None)  # not in 0.11
    return list(files) if key is None else sorted(files, key=key)


def _local_only(utils: Any, local_expert_ids: Any) -> Callable[[str], bool]:
    skip = utils.should_skip_weight
    return lambda name: not skip(name, local_expert_ids)


# ---- the load format ----


def format_options(extra: object) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """What ``--model-loader-extra-config`` says.

    Returns:
        Our options, keys for vLLM's own loader, and whether the ranks of tensor parallelism
        exchange what they read.

    Raises:
        OptionError: a key or value is not allowed.
    """
    if not isinstance(extra, Mapping):
        raise OptionError(
            f"model_loader_extra_config={extra!r}: give a JSON object of options, such as"
            ' {"io": "direct"}'
        )
    theirs = {name: value for name, value in extra.items() if name in _THEIRS}
    options = {name: value for name, value in extra.items() if name not in _THEIRS}
    group = options.pop("group", None)
    if group not in (None, "tp"):
        raise OptionError(f"group={group!r}: allowed is 'tp', the ranks of tensor parallelism")
    for name in options:
        if name in _OF_THE_PROCESS:
            raise OptionError(
                f"option {name!r} is of the whole process: set FASTST_{name.upper()} in place of"
                " naming it in model_loader_extra_config"
            )
    with_options(current(), options)
    return options, theirs, group is not None


def loader_class(default: Any) -> Any:
    """The class behind the load format: vLLM's own loader over our iterator."""

    def init(self: Any, load_config: Any) -> None:
        options, theirs, group = format_options(load_config.model_loader_extra_config)
        # vLLM's loader refuses a format and keys that it does not know.
        plain = dataclasses.replace(
            load_config, load_format="auto", model_loader_extra_config=theirs
        )
        default.__init__(self, plain)
        self._fastst_options, self._fastst_group = options, group

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
        _note(self, model_config, model)
        return default.get_all_weights(self, model_config, model)

    def _get_weights_iterator(self: Any, source: Any) -> Any:
        return _format_iterator(default, self, source)

    body = {
        "__doc__": loader_class.__doc__,
        "__module__": __name__,
        "__init__": init,
        "get_all_weights": get_all_weights,
        "_get_weights_iterator": _get_weights_iterator,
    }
    return type("FaststModelLoader", (default,), body)


def _format_iterator(default: Any, loader: Any, source: Any) -> Any:
    asked: list[bool] = []
    found = noted(loader, _ALL)
    exchange = _tensor_parallel_group if loader._fastst_group else None
    known = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    load = _FormatLoad(
        **known | {"exchange": exchange},
        options=loader._fastst_options,
        asked=lambda: asked.append(True),
    )
    original = inspect.unwrap(default._get_weights_iterator, stop=_calls_the_iterator)
    function = stock.with_globals(original, **{_ITERATOR: _streaming()})
    with within(load):
        result = function(loader, source)
    if not asked:
        reason = Fallback(f"this checkpoint is not read by {_ITERATOR}")
        report_stock("vllm", source.model_or_path, load.place.device, reason)
        fell_back_unasked("vllm", str(source.model_or_path), reason)
    return result


def _tensor_parallel_group() -> Any:
    return _groups().get_tp_group().device_group


def _calls_the_iterator(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and _ITERATOR in code.co_names


def _is_not_ours(function: Any) -> bool:
    where = getattr(function, "__globals__", {}).get("__name__", "")
    return not where.startswith("fastst_patch.")


def _streaming() -> Callable[..., Any]:
    """The iterator of vLLM, replaced whether ``patch()`` is in force or not."""
    original = inspect.unwrap(getattr(sys.modules[_UTILS], _ITERATOR), stop=_is_not_ours)
    return lambda *args, **kwargs: weights_iterator(original, args, kwargs)

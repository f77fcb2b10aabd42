"""What transformers is asked in a rehearsal: a model by its config alone, loaded by transformers' own loader.

The loader runs as it is (device maps, quantisation, its warm-up of the caching allocator), on a checkpoint of stand-ins:
no file of weights is read, and none need exist.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from oomless.models.spec import resolve_for_plan
from oomless.programs.stand_ins import META, StandIns


def changes(stand_ins: StandIns) -> list[tuple[Any, str, Any]]:
    """Return what is to be patched in transformers."""
    import transformers
    from transformers import core_model_loading
    from transformers.models.auto import auto_factory, modeling_auto
    from transformers.models.auto.configuration_auto import AutoConfig

    with suppress(ImportError):
        import bitsandbytes  # noqa: F401  # looks for CUDA's library when it is imported

    base = transformers.PreTrainedModel
    autos = [
        cls
        for cls in vars(modeling_auto).values()
        if isinstance(cls, type)
        and issubclass(cls, auto_factory._BaseAutoModelClass)
        and "from_pretrained" in vars(cls)
    ]
    read_config = AutoConfig.__dict__["from_pretrained"].__func__
    load = base.__dict__["from_pretrained"].__func__

    def config_of(name: Any, **kwargs: Any) -> Any:
        if os.path.isdir(str(name)):
            config = read_config(AutoConfig, name, **kwargs)
        else:
            config = resolve_for_plan(str(name)).config
        if not config.architectures:
            named = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
            config.architectures = None if named is None else [named]
        return config

    def config_from_pretrained(cls: Any, name: Any, /, **kwargs: Any) -> Any:
        unused = kwargs.pop("return_unused_kwargs", False)
        config = config_of(name)
        for key in [key for key in kwargs if hasattr(config, key) and key not in _OF_LOADING]:
            setattr(config, key, kwargs.pop(key))
        return (config, kwargs) if unused else config

    def auto_from_pretrained(cls: Any, name: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        config = config if config is not None else config_of(name)
        of_config = {key: kwargs.pop(key) for key in list(kwargs) if hasattr(config, key) and key not in _OF_LOADING}
        for key, value in of_config.items():
            setattr(config, key, value)
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_CONFIG}
        model_class = auto_factory._get_model_class(config, cls._model_mapping)
        return model_class.from_pretrained(name, *args, config=config, **kwargs)

    def model_from_pretrained(cls: Any, name: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        config = config if config is not None else config_of(name)
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_CONFIG and key != "use_safetensors"}
        model = load(cls, None, *args, config=config, state_dict=_checkpoint(cls, config, stand_ins), **kwargs)
        model.config._name_or_path = model.name_or_path = str(name)
        return model

    return [
        (core_model_loading, "ThreadPoolExecutor", _AtOnce),  # modes of torch belong to one thread
        (AutoConfig, "from_pretrained", classmethod(config_from_pretrained)),
        *((auto, "from_pretrained", classmethod(auto_from_pretrained)) for auto in autos),
        (base, "from_pretrained", classmethod(model_from_pretrained)),
    ]


class _AtOnce:
    """A pool of threads that has none: what is submitted has been done."""

    def __init__(self, max_workers: int) -> None: ...

    def submit(self, function: Any, *args: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **how: Any) -> None: ...


_OF_LOADING = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")
_OF_CONFIG = (
    "trust_remote_code",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "code_revision",
)


def _checkpoint(cls: Any, config: Any, stand_ins: StandIns) -> dict[str, torch.Tensor]:
    """Return what the files of this model hold, as stand-ins on the host that take no memory there."""
    from transformers.initialization import no_init_weights

    dtype = getattr(config, "dtype", None) or torch.float32
    with no_init_weights(), torch.device(META):
        model = cls(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    with stand_ins.making(on_gpu=False):
        return {
            name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=META)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }

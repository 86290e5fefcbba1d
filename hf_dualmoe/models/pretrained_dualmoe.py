"""Save models so that they load without this package; refuse to load what does not fit.

This file travels to the Hub as remote code together with the other *_dualmoe.py files.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from .inputs_dualmoe import create_image_processor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NO_ADAPTERS = (
    "Adapters are not loaded: their weights come from elsewhere and are not checked. To use one that you trust, load "
    "the model without it and call peft.PeftModel.from_pretrained(model, adapter)."
)
SEARCH_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class RobustPreTrainedModel(PreTrainedModel):
    """Base of both models: keeps timm's initialisation, saves all that loading needs, refuses what does not fit."""

    _auto_class = "AutoModelForImageClassification"  # `save_pretrained` copies the code, of parts of a model too
    _publish: Callable[..., Any] | None = None  # see `register_publisher`
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # timm's attention is that of PyTorch; an F_S or F_R of transformers answers for itself
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer scales it for gradient accumulation

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):  # of `fully_shard`; code is saved by module and name of the class
            own = next(base for base in cls.__mro__[1:] if issubclass(base, RobustPreTrainedModel))
            cls.__module__, cls.__name__ = own.__module__, own.__name__

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def _keep_initialisation(self) -> None:
        """Tell transformers not to initialise again what was just built on a real device."""
        for module in self.modules():
            if not any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module._is_hf_initialized = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, through timm's own checkpointing of each backbone.

        The arguments are those of the parent; timm's checkpointing has no settings.
        """
        self._set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_grad_checkpointing(False)

    def _set_grad_checkpointing(self, enable: bool) -> None:
        for module in self.modules():
            if hasattr(module, "set_grad_checkpointing"):  # timm's
                module.set_grad_checkpointing(enable)
            elif isinstance(module, PreTrainedModel) and not isinstance(module, RobustPreTrainedModel):
                if module.supports_gradient_checkpointing:  # an F_S or F_R of transformers
                    (module.gradient_checkpointing_enable if enable else module.gradient_checkpointing_disable)()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part recomputes its activations; timm and transformers have different names for it."""
        names = ("grad_checkpointing", "gradient_checkpointing")
        return any(getattr(module, name, False) for module in self.modules() for name in names)

    @property
    def is_activation_checkpointing(self) -> bool:
        """The newer name of `is_gradient_checkpointing`."""
        return self.is_gradient_checkpointing

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        use_safetensors: bool = True,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model; as `PreTrainedModel.from_pretrained`, but from safetensors only, complete and undamaged ones.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            model_args, kwargs: As in `PreTrainedModel.from_pretrained`.
            use_safetensors: True.
            output_loading_info: Whether to return what was loaded and how, too.
            ignore_mismatched_sizes: Whether weights of another shape than the config's may start anew.

        Raises:
            ValueError: A field of the config is out of range, the model would be absurdly large, the weights are
                damaged or do not fit the config, or there is an adapter_config.json.
            OSError: There are no weights in safetensors format.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False is not allowed: other weight files can run code.")
        refuse_adapter(pretrained_model_name_or_path, kwargs)  # before transformers reads, and follows, the file
        # mismatches are let through here, so that check_loaded_weights names them with all else that is wrong
        options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs, **options)
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise ValueError(f"The weights are not a valid safetensors file: {error}") from error
            raise
        check_loaded_weights(model, info, ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        check_weight_files(model, checkpoint_files)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse adapters, which `from_pretrained` and `pipeline` would load unasked; takes any arguments.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_ADAPTERS)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> None:
        """Save weights, config, the code files and an image processor, for all Auto classes and `pipeline`.

        Args:
            save_directory: Folder to save in; made where it does not exist.
            is_main_process: Whether this process writes.
            push_to_hub: Upload afterwards, with all that `push_to_hub` sends.
            repo_id: Hub id to upload to; None = the name of the folder.
            commit_message, commit_description, private, token, revision, create_pr: As in `push_to_hub`.
            options: Further arguments of `PreTrainedModel.save_pretrained`.
        """
        if is_main_process and self.config.image_size is not None:
            create_image_processor(self.config.image_size).save_pretrained(save_directory)
        module = type(self).__module__.split(".")[-1]
        self.config.auto_map = {"AutoModel": f"{module}.{type(self).__name__}"}  # transformers adds the other classes
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if push_to_hub and is_main_process:  # the parent's own upload would miss the image processor
            self.push_to_hub(
                repo_id or os.path.basename(os.path.normpath(save_directory)),
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def register_publisher(cls, publish: Callable[..., Any]) -> None:
        """Say what `push_to_hub` calls from now on, as `publish(model, repo_id, **options)`.

        The code of a model travels without the package that made it. Where that package is there, it can send more
        than the model this way, such as a model card.
        """
        RobustPreTrainedModel._publish = staticmethod(publish)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload weights, config, code files and image processor in one commit.

        Args:
            repo_id: Hub id, user/name; or a name alone, for the user of the token.
            options: Arguments of `PreTrainedModel.push_to_hub`, such as `private`, `revision` and `commit_message`.
                Where hf_dualmoe is installed, those of its `hub.push_model`, which sends a model card, too.

        Returns:
            What the Hub says of the commit.
        """
        if self._publish is None:
            return super().push_to_hub(repo_id, **options)
        return self._publish(self, repo_id, **options)


def refuse_adapter(name_or_path: str | os.PathLike | None, kwargs: dict) -> None:
    """Refuse a folder or repository with an adapter_config.json.

    With peft, transformers would put the adapter on the model, and for a repository take the model itself from another
    one, which the file names. A folder is refused without peft too; in a repository nobody looks for the file then.

    Args:
        name_or_path: Folder or Hub id, as given to `from_pretrained`.
        kwargs: The other arguments of `from_pretrained`; read only.

    Raises:
        ValueError: There is such a file, or an Auto class has found one.
    """
    source = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if source is None and name_or_path is not None and (is_peft_available() or os.path.isdir(name_or_path)):
        options = {name: kwargs[name] for name in SEARCH_ARGUMENTS if name in kwargs}
        if find_adapter_config_file(name_or_path, **options) is not None:
            source = name_or_path
    if source is not None:
        raise ValueError(f"{source} has an adapter_config.json. {NO_ADAPTERS}")


def check_weight_files(model: nn.Module, files: list[str] | None) -> None:
    """Refuse weights that are no safetensors, or far too small for the model, before the model takes any memory.

    Raises:
        ValueError: As above.
    """
    if files is None:
        return
    if others := [os.path.basename(file) for file in files if not file.endswith(".safetensors")]:
        raise ValueError(f"{others[0]} is not loaded: only safetensors are, since other weight files can run code.")
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    size = sum(os.path.getsize(file) for file in files)
    if numbers > 4 * size + 10**8:  # more than four numbers in a byte: no format is that dense
        raise ValueError(f"The config asks for {numbers:,} numbers, but the weight files have {size:,} bytes only.")


def check_loaded_weights(model: nn.Module, info: dict, ignore_mismatched_sizes: bool) -> None:
    """Refuse a loaded model whose weights do not fit the config or are damaged.

    Args:
        model: The model as loaded.
        info: What `from_pretrained` reports of the loading.
        ignore_mismatched_sizes: Whether weights of another shape may be replaced by new ones.

    Raises:
        ValueError: Weights are missing, unexpected, of another shape, NaN or infinite.
    """
    mismatched = [] if ignore_mismatched_sizes else sorted(info["mismatched_keys"])
    replaced = {key for key, *_ in info["mismatched_keys"]}
    wrong = {
        "missing": sorted(set(info["missing_keys"]) - replaced),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": [f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in mismatched],
    }
    if any(wrong.values()):
        reasons = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for kind, names in wrong.items()
            if names
        ]
        raise ValueError(f"The weights do not fit the config: {'; '.join(reasons)}.")
    for name, tensor in model.state_dict().items():
        if tensor.dtype in FLOATS and tensor.numel() > 0 and not tensor.is_meta:
            if not all(math.isfinite(value) for value in torch.aminmax(tensor)):  # NaN comes through both
                raise ValueError(f"The weight {name} holds values that are NaN or infinite.")


def check_same_parameters(own: dict[str, Tensor], given: dict[str, Tensor], target: str) -> None:
    """Raise a ValueError unless weights have the names and shapes of those that they are to replace."""
    wrong = set(own) ^ set(given) | {name for name in set(own) & set(given) if own[name].shape != given[name].shape}
    if wrong:
        raise ValueError(
            f"The source does not fit {target}: {len(wrong)} parameters are missing, unexpected or of another shape, "
            f"such as {', '.join(sorted(wrong)[:5])}."
        )


__all__ = ["RobustPreTrainedModel"]

"""Run a timm backbone stage by stage, with a hook between stages."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd._messages import close_matches, shortened
from fastkd.models import hub

Fuse = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Map (stage index, map) to (fused map, input of the next stage)."""

_SUPPORTED = (
    "supported families: Swin, ConvNeXt, ResNet, RegNet, EfficientNet, MobileNet, EfficientViT, FastViT, TinyViT, "
    "RepViT, PVT and bring-your-own-blocks"
)


class StagedBackbone(nn.Module):
    """A timm network that is a chain of modules, with a hook between its stages.

    timm's ``FeatureListNet`` stores a network as an ordered chain and returns the outputs of some of its modules. This
    class runs the same chain, but passes each returned map to ``fuse`` and feeds the *fused* map to the next module.

    Args:
        name: A timm model name.
        args: Arguments for ``timm.create_model``.
        out_indices: Indices of the stages to return.
        weights: None (random), ``"timm"`` (timm's published weights, downloaded or cached), or the path of a
            state dict (``.safetensors``, or a pickle of tensors) under timm's names for that model.

    Attributes:
        channels: Channels of each returned stage.
        strides: Stride of each returned stage in input pixels.
        normalisation: Mean and standard deviation of the images that the weights were trained on, from timm's
            configuration; None for random weights.

    Raises:
        ValueError: The name is unknown, timm rejects the arguments, the network is not a chain of modules, or the
            weights do not match.
    """

    def __init__(
        self, name: str, args: dict[str, Any], out_indices: Sequence[int], weights: str | Path | None = None
    ) -> None:
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models import FeatureListNet
        from timm.models._features import FeatureInfo

        network = _create(name, args, pretrained=weights == "timm")
        missing = set() if weights in (None, "timm") else _load_weights(network, Path(str(weights)))
        self.normalisation = None if weights is None else _normalisation(network, weights)
        info = getattr(network, "feature_info", None)
        if not info:
            raise ValueError(f"backbone {name!r} has no feature stages in timm; choose a hierarchical network")
        stages = len(info.info if isinstance(info, FeatureInfo) else info)
        if min(out_indices) < 0 or max(out_indices) >= stages:
            raise ValueError(f"out_indices={tuple(out_indices)}: backbone {name!r} has stages 0 to {stages - 1}")
        own = [n for n, _ in network.named_parameters(recurse=False)]
        if own:
            raise ValueError(
                f"backbone {name!r} is not a chain of modules: it has parameters ({shortened(own, 6)}) outside of its "
                f"modules; {_SUPPORTED}"
            )
        chain = None
        for flatten in (True, False):  # each family of networks needs one or the other
            try:
                chain = FeatureListNet(
                    network,
                    out_indices=tuple(out_indices),
                    output_fmt=getattr(network, "output_fmt", "NCHW"),
                    flatten_sequential=flatten,
                )
                break
            except AssertionError:
                continue
        if chain is None:
            raise ValueError(
                f"backbone {name!r} is not a chain of modules, so its stages cannot be fused one by one; {_SUPPORTED}"
            )
        for module in chain.modules():
            if isinstance(module, PatchEmbed) and not module.strict_img_size:
                # Swin pads its windows and mergings, so pad the patches too. (Declared Final, but only for torch.jit.)
                setattr(module, "dynamic_img_pad", True)  # noqa: B010
        has_option = "strict_img_size" in inspect.signature(type(network)).parameters
        self._size_hint = "backbone_args={'strict_img_size': False} allows any size" if has_option else ""
        self.blocks = nn.ModuleDict(dict(chain.items()))
        self.channels_last = str(chain.output_fmt) in ("NHWC", "Format.NHWC")
        self.channels: list[int] = list(chain.feature_info.channels())
        self.strides: list[int] = list(chain.feature_info.reduction())
        self._ends = [key for key, _ in chain.items() if key in chain.return_layers]
        kept = {id(p) for p in self.parameters()}
        unset = sorted(n for n, p in network.named_parameters() if id(p) in kept and n in missing)
        if unset:
            names = shortened(unset, 6)
            raise ValueError(f"{weights}: no weights for {names} of backbone {name!r}; nothing was loaded")

    def forward(self, image: Tensor, fuse: Fuse) -> list[Tensor]:
        """Return the fused stage maps (B, C_i, H_i, W_i).

        Args:
            image: (B, 3, H, W).
            fuse: Called with a stage's index and its map (B, C_i, H_i, W_i); returns (fused map, input of the next
                stage), both of that shape.

        Raises:
            ValueError: The backbone does not support the image size, or a stage does not return a map.
        """
        maps: list[Tensor] = []
        x = image
        for name, block in self.blocks.items():
            try:
                x = block(x)
            except AssertionError as error:  # timm's check of the image size
                reason = str(error).rstrip(".") or f"{name!r} needs a map size that its blocks divide"
                details = "; ".join(filter(None, [reason, self._size_hint]))
                raise ValueError(
                    f"the backbone does not support an image of {tuple(image.shape[-2:])}: {details}"
                ) from error
            except (RuntimeError, ValueError) as error:
                error.add_note(
                    f"Raised by {name!r} of the backbone at an image of {tuple(image.shape[-2:])}; networks with "
                    "position embeddings support only the size they were built for: pass it in backbone_args, or "
                    "choose another network. Networks of token sequences (LeViT) cannot be fused."
                )
                raise
            if name in self._ends:
                if not isinstance(x, Tensor) or x.dim() != 4:
                    got = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                    raise ValueError(f"stage {name!r} returns {got}, not a map: choose a hierarchical backbone")
                x = x.permute(0, 3, 1, 2) if self.channels_last else x
                out, x = fuse(len(maps), x)
                maps.append(out)
                x = x.permute(0, 2, 3, 1) if self.channels_last else x
        return maps


def _create(name: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        known = timm.list_models()
        containing = sorted((other for other in known if str(name) and str(name) in other), key=len)
        close = list(dict.fromkeys([*containing, *close_matches(name, known, limit=4, cutoff=0.4)]))[:4]
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"timm {timm.__version__} has no backbone {name!r}{hint}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    if args.get("blocks") and isinstance(args["blocks"][0], dict):
        from timm.models.byobnet import ByoBlockCfg

        args["blocks"] = tuple(ByoBlockCfg(**block) for block in args["blocks"])
    args.setdefault("num_classes", 0)
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:
        if pretrained and (reason := hub.fetch_failure(error)):
            raise ValueError(
                f"timm's weights of {name!r} could not be fetched ({reason}); alternatively pass a weights file as "
                "backbone_weights"
            ) from error
        if pretrained and "No pretrained weights" in str(error):
            raise ValueError(
                f"timm publishes no weights of {name!r}: omit backbone_weights, pass a file, or choose another backbone"
            ) from error
        if isinstance(error, TypeError | AssertionError | ValueError | IndexError):
            raise ValueError(f"timm cannot build {name!r} with backbone_args={args}: {error}") from error
        raise


def _normalisation(network: nn.Module, weights: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std from the configuration next to a weights file, or from timm's configuration of the model."""
    known: list[Any] = [getattr(network, "pretrained_cfg", None)]
    config_file = Path(str(weights)).parent / "config.json"
    if weights != "timm" and config_file.is_file():  # layout of timm's hub folders
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
            known.insert(0, values.get("pretrained_cfg") if isinstance(values, dict) else None)
        except ValueError:
            pass  # an unrelated file of that name
    for found in known:
        mean, std = (found.get("mean"), found.get("std")) if isinstance(found, dict) else (None, None)
        if mean is not None and std is not None and len(mean) == len(std) == 3:
            return tuple(mean), tuple(std)
    return None


def _load_weights(network: nn.Module, path: Path) -> set[str]:
    """Load a timm state dict; return the names missing from it, which may belong to a head that is dropped later."""
    import sys

    from fastkd.models.checkpoint import read_state_dict

    state = read_state_dict(path)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, network)
        except Exception as error:  # timm's filter assumes that its keys exist
            raise ValueError(
                f"{path}: timm cannot convert these keys for a {type(network).__name__} "
                f"({type(error).__name__}: {error})"
            ) from error
    own = network.state_dict()
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if wrong:
        k = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} tensors have another shape, e.g. {k} is {tuple(state[k].shape)}, expected "
            f"{tuple(own[k].shape)}"
        )
    extra = sorted(k for k in state.keys() - own.keys() if not k.startswith(("head", "fc.", "classifier", "norm.")))
    if extra:
        raise ValueError(f"{path}: keys that this backbone does not have: {shortened(extra, 6)}")
    return set(network.load_state_dict(state, strict=False).missing_keys)

"""Where other programs put a network's tensors in a file, what they call them, and whose tensors they are."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

StateDict = dict[str, Tensor]
LAYOUTS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net", "weights")
"""Entries of a file that hold tensors by name; where a file has several, an averaged one comes first, then in order."""
WRAPPERS = ("module", "_orig_mod", "model", "net", "net_g", "netG", "generator", "network", "g")
"""What data-parallel training, torch.compile and trainers put before every name."""
ANCHOR = "conv_first.weight"
"""A tensor that every network of this project has: what stands before it stands before all of its tensors."""
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged)(?![a-z])", re.IGNORECASE)
"""A word in the name of an entry or a prefix that holds averaged weights."""
DEPTH = 4
"""How deep entries of a file are looked through."""
COMPUTED = re.compile(r"(.*\.)?(relative_position_index\w*|attn_mask\w*)")
"""Buffers that some programs save and every network computes, under names that it may not have itself."""

OTHER_NETWORKS: tuple[tuple[str, str], ...] = (
    ("a U-shaped discriminator", r"conv[1-8]\.weight_orig|down\.0\.parametrizations\.weight\.original"),
    ("a VGG discriminator", r"conv0_0\.weight|bn0_1\.weight"),
    ("a discriminator", r"(.*\.)?(net_d|netD|discriminator)\..*"),
    ("RRDBNet (ESRGAN, Real-ESRGAN)", r"(body|RRDB_trunk)\.0\.(rdb1|RDB1)\..*|model\.1\.sub\.0\.RDB1\..*"),
    ("DAT", r"layers\.0\.blocks\.\d+\.attn\.(attns\.0\.rpe_biases|temperature|attns\..*)"),
    ("ATD", r"layers\.0\.residual_group\.layers\.0\.attn_(win|atd|aca)\..*"),
    ("DRCT", r"layers\.0\.swin1\..*"),
    ("Swin2SR", r"layers\.0\.residual_group\.blocks\.0\.attn\.logit_scale"),
    ("SwinIR", r"layers\.0\.residual_group\.blocks\.0\.attn\.qkv\.weight"),
    ("OmniSR", r"residual_layer\.0\.residual_layer\..*"),
    ("SPAN", r"block_1\.c1_r\..*"),
    ("Restormer", r"encoder_level1\.0\.attn\.temperature"),
    ("NAFNet", r"encoders\.0\.0\.beta|intro\.weight"),
    ("SCUNet", r"m_head\.0\.weight"),
    ("EDSR or SRResNet", r"body\.0\.conv1\.weight|body\.0\.body\.0\.weight"),
    ("SRVGGNet (Real-ESRGAN compact)", r"body\.1\.weight"),
    ("VGG, AlexNet or the like", r"features\.0\.weight"),
)
"""Networks that are not built here, by a tensor that gives them away; the first that fits counts."""


class Candidate(NamedTuple):
    """Tensors of one network in a file: the entries on the way to them, and what stands before their names."""

    path: tuple[str, ...]
    prefix: str
    tensors: StateDict

    @property
    def label(self) -> str:
        """How a message names it."""
        return ".".join((*self.path, self.prefix)).strip(".") or "the file itself"

    @property
    def is_averaged(self) -> bool:
        """Whether its name says that weights were averaged while training."""
        return AVERAGED.search(self.label) is not None

    @property
    def is_usual(self) -> bool:
        """Whether all on the way to it is what training programs put there."""
        return set(self.label.split(".")) <= {*LAYOUTS, *WRAPPERS, "the file itself"}


def state_dict_in(content: Any, source: object) -> StateDict:
    """The tensors of the network that a file or mapping holds, under the published names.

    They may lie alone or beside anything else (optimizer, epoch, a discriminator), in entries named as in `LAYOUTS` or
    otherwise, with whatever prefix before their names. Averaged weights are taken before others. Files without a
    network of this project (a perceptual loss's, for example) give what lies in the first of `LAYOUTS`.
    ValueError where there are no tensors by name, or several networks of which none is meant more than the others.
    """
    found = [candidate for flat in _flat(content) for candidate in _candidates(*flat)]
    if found:
        chosen = _choose(found, source)
        size = len(chosen.prefix)
        return {name[size:]: value for name, value in chosen.tensors.items() if name.startswith(chosen.prefix)}
    return _without_wrappers(_any_tensors(content, source))


def _flat(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    """Every mapping inside that holds tensors by name, with the entries on the way to it."""
    if not isinstance(content, Mapping) or len(path) > DEPTH:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        yield from _flat(value, (*path, str(key)))


def _candidates(path: tuple[str, ...], tensors: StateDict) -> list[Candidate]:
    """The networks among tensors by name."""
    anchors = [name for name in tensors if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    return [Candidate(path, name.removesuffix(ANCHOR), tensors) for name in anchors]


def _choose(found: list[Candidate], source: object) -> Candidate:
    """The averaged one, else the one with a usual name; ValueError where several are left."""
    for kind in ([one for one in found if one.is_averaged], [one for one in found if one.is_usual]):
        if kind:
            found = kind
            break
    if len(found) > 1:
        found = sorted(found, key=_rank)
        if _rank(found[0]) == _rank(found[1]):
            named = ", ".join(one.label for one in found)
            raise ValueError(f"{source} holds several networks ({named}): save the one that is meant by itself")
    return found[0]


def _rank(candidate: Candidate) -> int:
    """The place of its outermost entry in `LAYOUTS`; what lies elsewhere comes last."""
    first = candidate.label.split(".")[0]
    return LAYOUTS.index(first) if first in LAYOUTS else len(LAYOUTS)


def _any_tensors(content: Any, source: object) -> StateDict:
    """The tensors in the first of `LAYOUTS` that is not empty, else those of the content itself."""
    for name in LAYOUTS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping) and content[name]:
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no state dict: expected tensors by name, or {', '.join(LAYOUTS)} with them")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        name, value = next(iter(content.items()))
        raise ValueError(f"{source} holds no state dict: {name!r} is a {type(value).__name__}, not a tensor")
    return tensors


def _without_wrappers(tensors: StateDict) -> StateDict:
    """Without the prefixes of `WRAPPERS` that all names share."""
    while True:
        first = {name.partition(".")[0] for name in tensors}
        if len(first) != 1 or not first <= set(WRAPPERS):
            return tensors
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}


def name_of_other(state: Mapping[str, Tensor]) -> str | None:
    """What other network a state dict belongs to, as far as one tensor gives it away; None for what may be ours."""
    if any(".conv_block." in key or ".overlap_attn." in key or ".gab." in key for key in state):
        return None
    for name, pattern in OTHER_NETWORKS:
        if any(re.fullmatch(pattern, key) for key in state):
            return name
    return None

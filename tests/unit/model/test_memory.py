"""The memory that images take: reckoned, chosen by, run out of."""

from typing import Any

import pytest
import torch

import model.memory
from model import build
from model.inference import Upscaler, upscale, upscale_tensor
from model.memory import MEMORY_SHARE, bytes_per_px, fitting_tile, free_bytes, is_out_of_memory, output_bytes
from tests.unit.model.test_inference import Greedy, image

SIZES = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "window_size": 8, "squeeze_factor": 6}
CPU = torch.device("cpu")

RAN_OUT = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "GET was unable to find an engine to execute this computation",
    "std::bad_alloc",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
    "bytes. Error code 12 (Cannot allocate memory)",
    "unable to mmap 4096 bytes from file </torch_1_2>: Cannot allocate memory (12)",
    "could not create a primitive",
)
HINT = "Run workload with environment variable ONEDNN_VERBOSE=all to get additional diagnostic information."
SAID_OTHERWISE = (
    *(
        f"could not create a primitive descriptor for the {kind} primitive. {HINT}"
        for kind in ("inner product forward propagation", "convolution forward propagation", "matmul", "reorder")
    ),
    "could not create a primitive descriptor for a gated mlp primitive",
    "could not construct a memory descriptor using a format tag",
    "could not get a memory descriptor from a memory object",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: no kernel image is available for execution on the device",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "libgomp.so.1: cannot allocate memory in static TLS block",
    "Given groups=1, weight of size [3, 5, 3, 3], expected input[1, 64, 16, 16] to have 5 channels",
)


@pytest.mark.parametrize("words", RAN_OUT)
def test_lack_of_memory_is_known_by_its_words(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("words", SAID_OTHERWISE)
def test_other_errors_are_not_taken_for_it(words: str) -> None:
    assert not is_out_of_memory(RuntimeError(words))


def test_lack_of_memory_has_types_of_its_own() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("any words"))


def test_what_the_libraries_really_say() -> None:
    """The allocator's refusal of a petabyte; oneDNN's of a type that no processor has in a linear layer."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError) as unsupported:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "none")
    assert not is_out_of_memory(unsupported.value)


@pytest.mark.parametrize("free", [10**7, 10**8, 10**9])
@pytest.mark.parametrize("overlap", [0, 16, 40])
def test_tiles_are_chosen_by_the_memory_that_is_free(free: int, overlap: int) -> None:
    network = build("hat", 4, **SIZES)
    smallest = max(2 * overlap, 8)
    if smallest**2 * bytes_per_px(network) > free:
        with pytest.raises(MemoryError, match=f"tiles of {smallest} px take .* free some"):
            fitting_tile(network, (512, 640), overlap, free)
        return
    tile = fitting_tile(network, (512, 640), overlap, free)
    whole = 512 * 640 * bytes_per_px(network) <= MEMORY_SHARE * free
    assert (tile is None) == whole
    if tile is not None:
        assert tile % 8 == 0
        assert tile >= smallest
        taken = tile**2 * bytes_per_px(network)
        assert taken <= max(MEMORY_SHARE * free, smallest**2 * bytes_per_px(network))


def test_tiles_and_images_at_once_share_the_memory() -> None:
    network = build("hat", 4, **SIZES)
    one, four = (fitting_tile(network, (4000, 4000), 16, 10**9, batch=batch) for batch in (1, 4))
    assert one is not None
    assert four is not None
    assert four == pytest.approx(one / 2, abs=8)
    assert fitting_tile(network, (4, 4000, 4000), 16, 10**9) == four
    with pytest.raises(MemoryError, match="tiles of 32 px, 500 at once, take"):
        fitting_tile(network, (4000, 4000), 16, 10**9, batch=500)


def test_what_the_result_takes_is_not_given_to_tiles() -> None:
    network = build("hat", 4, **SIZES)
    result = output_bytes(4, (512, 640, 3), False)
    assert result < output_bytes(4, (512, 640, 3), False, 2) < output_bytes(4, (512, 640, 3), True)
    assert fitting_tile(network, (512, 640), 32, 10**9 + result, result) == fitting_tile(network, (512, 640), 32, 10**9)
    with pytest.raises(MemoryError, match=r"the result takes 0\.126 GB .* cut the image into parts"):
        fitting_tile(network, (512, 640), 32, result, result)


def test_bf16_counts_half_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in (2, 4):
        network = build("hat", scale, **SIZES)
        full = bytes_per_px(network)
        monkeypatch.setattr(model.memory, "has_bf16", lambda device: True)
        assert 0.5 * full < bytes_per_px(network, "bf16") < 0.7 * full
        monkeypatch.setattr(model.memory, "has_bf16", lambda device: False)
        assert bytes_per_px(network, "bf16") == full
    assert bytes_per_px(network.double()) == 2 * full
    assert bytes_per_px(network.bfloat16()) == full / 2


def test_a_gpus_free_memory_is_what_the_driver_and_pytorch_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU here: what PyTorch holds for later counts as free, what its tensors hold does not."""
    answers = {"mem_get_info": (5000, 9000), "memory_reserved": 700, "memory_allocated": 300}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(torch.device("cuda", 0)) == 5400


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("model.inference.free_bytes", lambda device: free)


def test_auto_takes_the_whole_image_where_it_fits_and_tiles_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    network, low_res = build("hat", 2, **SIZES).eval(), image(80, 72)
    upscaler = Upscaler(network, tile="auto", overlap=8)
    with_free(monkeypatch, 10**9)
    whole = upscaler(low_res)
    assert upscaler.tile_used is None
    with_free(monkeypatch, output_bytes(2, (80, 72, 3), False) + int(40**2 * bytes_per_px(network) / MEMORY_SHARE))
    tiled = upscaler(low_res)
    assert upscaler.tile_used == 40
    assert tiled.shape == whole.shape
    assert (tiled == upscale(network, low_res, tile=40, overlap=8)).all()
    with_free(monkeypatch, 10**5)
    with pytest.raises(MemoryError, match="GB are free: free some"):
        upscaler(low_res)


def test_a_result_elsewhere_than_the_network_is_reckoned_with_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("hat", 2, **SIZES).to("meta")
    upscaler = Upscaler(network, tile="auto", overlap=8)
    monkeypatch.setattr("model.inference.free_bytes", lambda device: 10**6 if device.type == "cpu" else 10**9)
    assert upscaler.choose((80, 80), 3, 1) is None
    with pytest.raises(MemoryError, match=r"the result takes .* where 0\.001 GB are free"):
        upscaler.choose((200, 200), 3, 1)


def test_what_one_image_taught_holds_for_the_next() -> None:
    network: Any = Greedy(24 * 24, every=1)
    upscaler = Upscaler(network, overlap=8)
    for number in range(3):
        upscaler.of_tensor(torch.rand(1, 3, 64, 64))
        assert upscaler.tile_used == 16
        failed = [size for size in network.sizes if size[2] > 24]
        assert failed == [(1, 3, 64, 64), (1, 3, 32, 32)], f"image {number} began anew"
    upscaler.of_tensor(torch.rand(1, 3, 16, 16))
    assert upscaler.tile_used is None


def test_tiles_as_asked_for_do_not_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judgement's: refused before work where that can be reckoned, and when memory runs out all the same."""
    network: Any = Greedy(24 * 24, every=1)
    network.config = {"embed_dim": 12}
    for tile, what in ((48, "tiles of 48 px"), (None, "the whole image")):
        with pytest.raises(MemoryError, match=f"out of memory with {what}, as asked for: ask for smaller tiles"):
            Upscaler(network, tile=tile, overlap=8, may_shrink=False).of_tensor(torch.rand(1, 3, 64, 64))
    assert {size[2] for size in network.sizes} == {48, 64}
    real = build("hat", 2, **SIZES).eval()
    with_free(monkeypatch, output_bytes(2, (64, 64, 3), False) + 40**2 * bytes_per_px(real))
    for asked, what in ((None, r"the whole image \(64 x 64 px\)"), (48, "tiles of 48 px")):
        with pytest.raises(MemoryError, match=f"{what}, as asked for, may not fit .* tiles of at most 40 px"):
            Upscaler(real, tile=asked, overlap=8, may_shrink=False)(image(64, 64))
    assert Upscaler(real, tile=40, overlap=8, may_shrink=False)(image(64, 64)).shape == (128, 128, 3)


def test_tensors_may_be_tiled_by_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = build("hat", 2, **SIZES).eval(), torch.rand(2, 3, 64, 64)
    with_free(monkeypatch, output_bytes(2, (128, 64, 3), False, 0) + int(2 * 32**2 * bytes_per_px(network) / 0.6) + 99)
    tiled = upscale_tensor(network, x, tile="auto", overlap=8)
    assert torch.allclose(tiled, upscale_tensor(network, x, tile=32, overlap=8), atol=1e-6)

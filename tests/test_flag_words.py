"""How the words of a flag in a GPU's memory are written, and streams held; by a driver that takes notes."""

import contextlib
import gc
import sys
from types import SimpleNamespace

import pytest
import torch

from qllm_ops import FULL, PriorityFlag
from qllm_ops.flag import _CudaWords


class Driver:
    """What `cuda.bindings.driver` does, as a list of calls."""

    CUstream = staticmethod(lambda handle: f"stream {handle}")

    def __init__(self, refuses=None):
        self.calls, self.refuses = [], refuses

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            status = 801 if name == self.refuses else 0
            if name == "cuStreamCreateWithPriority":
                return status, 100 + sum(call[0] == name for call in self.calls)
            return (
                (status, "context") if name in ("cuDevicePrimaryCtxRetain", "cuCtxPopCurrent") else (status,)
            )

        return call


class Words:
    """Two words on device 3, and the streams that their memory waits for before anybody else gets it."""

    device = SimpleNamespace(index=3)

    def __init__(self):
        self.streams = []

    def __len__(self):
        return 2

    def data_ptr(self):
        return 4096

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


@pytest.fixture
def words_on_a_gpu(monkeypatch):
    """The words of a CUDA flag with a driver and streams that only take notes."""

    def make(driver, writer=None, gate="host", words=None):
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(driver=driver)))
        monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
        return _CudaWords(Words() if words is None else words, writer, gate)

    stream = lambda number: SimpleNamespace(  # noqa: E731
        cuda_stream=number, wait_stream=lambda other: None, synchronize=lambda: None
    )
    made = lambda device, priority: stream(-priority)  # noqa: E731
    made.priority_range = lambda: (0, -5)
    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: stream(handle))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(77))
    monkeypatch.setattr("qllm_ops.flag.SPARE_STREAMS", {})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    return make


def test_words_are_written_on_the_flags_stream_and_streams_held_by_the_driver(words_on_a_gpu):
    driver = Driver()
    words = words_on_a_gpu(driver, gate="stream")
    assert words.kind == "stream"
    # Any thread may write, also one that has never used the device.
    around = (("cuCtxPushCurrent", "context"), ("cuCtxPopCurrent",))
    # Tried on the first word, which is FULL already and so holds nobody.
    assert driver.calls == [
        ("cuDevicePrimaryCtxRetain", 3),
        around[0], ("cuStreamCreateWithPriority", 1, -5), around[1],
        around[0], ("cuStreamWriteValue32", "stream 101", 4096, FULL, 0), around[1],
        around[0], ("cuStreamWaitValue32", "stream 101", 4096, 1, 0), around[1],
    ]  # fmt: skip
    driver.calls.clear()
    flag = PriorityFlag(gate="stream")
    flag._write_word = words
    flag.pause(1)
    flag.hold(1)
    assert driver.calls == [
        around[0], ("cuStreamWriteValue32", "stream 101", 4100, 0, 0), around[1],
        around[0], ("cuStreamWaitValue32", "stream 77", 4100, 1, 0), around[1],
    ]  # fmt: skip


def test_a_flag_writes_on_a_stream_that_torch_gives_to_nobody(words_on_a_gpu):
    """Of torch's pool it might be the stream that is held, and the resume would queue behind the wait."""
    driver = Driver()
    first, second = (words_on_a_gpu(driver, gate="stream") for _ in range(2))
    made = [call for call in driver.calls if call[0] == "cuStreamCreateWithPriority"]
    assert made == [("cuStreamCreateWithPriority", 1, -5)] * 2  # non-blocking, the most urgent
    assert (first.stream.cuda_stream, second.stream.cuda_stream) == (101, 102)
    first.close()
    assert words_on_a_gpu(driver).stream is first.stream  # of which there are no more than flags at once
    assert words_on_a_gpu(Driver("cuStreamCreateWithPriority")).stream.cuda_stream == 5


def test_a_spare_stream_that_another_thread_takes_first_is_no_error(words_on_a_gpu, monkeypatch):
    class Taken(list):
        """Looks as if it had one, as it did a moment ago."""

        def __bool__(self):
            return True

    monkeypatch.setattr("qllm_ops.flag.SPARE_STREAMS", {3: Taken()})
    assert words_on_a_gpu(Driver(), gate="stream").stream.cuda_stream == 101


def test_the_memory_of_words_waits_for_writes_and_for_streams_that_were_held(words_on_a_gpu):
    words = words_on_a_gpu(Driver(), gate="stream")
    assert words.stream.cuda_stream in words.words.streams
    words.hold(0)
    words.hold(1)
    assert words.words.streams.count(77) == 1  # a note is enough, and not free


def test_a_flag_that_goes_lets_go_what_it_holds(words_on_a_gpu, monkeypatch):
    """Nobody is left who could write the word that a stream waits for."""
    driver = Driver()
    words = words_on_a_gpu(driver, gate="stream")
    there = SimpleNamespace(device=torch.device("cuda", 3))
    monkeypatch.setattr(torch, "full", lambda *args, **kwargs: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("qllm_ops.flag._CudaWords", lambda *args: words)
    flag = PriorityFlag("cuda", gate="stream")
    assert flag.device.index == 3
    flag.pause(0, timeout_s=None)
    words.hold(0)
    driver.calls.clear()
    del flag
    gc.collect()
    writes = [call for call in driver.calls if call[0] == "cuStreamWriteValue32"]
    assert writes == [("cuStreamWriteValue32", "stream 101", 4096 + 4 * c, FULL, 0) for c in range(2)]


def test_pinned_words_lie_on_the_cpu_whatever_the_default_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    words = _CudaWords.__new__(_CudaWords)
    words.pinned = {}
    with torch.device("meta"):
        assert words._pinned(7).tolist() == [7]


def test_a_driver_that_refuses_is_an_error_only_for_who_asked_for_it(words_on_a_gpu):
    assert words_on_a_gpu(Driver("cuStreamWriteValue32")).kind == "copy"
    assert words_on_a_gpu(Driver(), writer="copy").kind == "copy"
    with pytest.raises(ValueError, match=r'writer must be "stream", "copy" or None, got .fill.'):
        words_on_a_gpu(Driver(), writer="fill")
    with pytest.raises(ValueError, match='writer="stream" does not work here'):
        words_on_a_gpu(Driver("cuStreamWriteValue32"), writer="stream")
    assert words_on_a_gpu(Driver("cuStreamWaitValue32"), writer="stream").kind == "stream"
    with pytest.raises(ValueError, match='gate="stream" does not work here'):
        words_on_a_gpu(Driver("cuStreamWaitValue32"), gate="stream")
    words = words_on_a_gpu(Driver())
    words.driver.refuses = "cuStreamWriteValue32"
    with pytest.raises(RuntimeError, match="refuses: 801"):
        words(0, 0)
    assert words.driver.calls[-1] == ("cuCtxPopCurrent",)


def test_a_copied_word_goes_on_the_flags_stream_from_memory_that_is_pinned_before(
    words_on_a_gpu, monkeypatch
):
    """Pinning for every pause could wait for the device, and a source of another dtype needs a kernel."""
    streams = []

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream.cuda_stream)
        yield
        streams.append(None)

    monkeypatch.setattr(torch.cuda, "stream", on)
    memory = torch.full((3,), FULL, dtype=torch.int32)
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *args, **how: streams.append(how) or copy_(*args, **how)
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    words = words_on_a_gpu(Driver(), writer="copy", words=memory)
    pinned = dict(words.pinned)
    assert {value: (word.dtype, word.tolist()) for value, word in pinned.items()} == {
        0: (torch.int32, [0]),
        FULL: (torch.int32, [FULL]),
    }
    words(1, 0)
    assert memory.tolist() == [FULL, 0, FULL]
    words(2, 0)
    words(1, FULL)
    words(0, 7)
    assert memory.tolist() == [7, FULL, 0]
    assert streams == [101, {"non_blocking": True}, None] * 4
    assert all(words.pinned[value] is word for value, word in pinned.items())


def test_a_launch_behind_a_fence_sees_the_words_written_so_far(words_on_a_gpu, monkeypatch):
    PriorityFlag().fence()  # on a CPU a word that is written is seen
    flag, waits = PriorityFlag(), []
    flag._write_word = words_on_a_gpu(Driver())
    current = SimpleNamespace(wait_stream=lambda other: waits.append(other))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    flag.fence()
    assert waits == [flag._write_word.stream]


@pytest.mark.gpu
@pytest.mark.parametrize("writer", ["copy", "stream", None])
def test_words_in_device_memory(writer):
    if writer == "stream":
        pytest.importorskip("cuda.bindings")
    flag = PriorityFlag("cuda", classes=2, writer=writer)
    torch.cuda.synchronize()
    assert flag.words.tolist() == [FULL, FULL]
    for value, act in (
        (0, lambda: flag.pause(0)),
        (0, lambda: flag.share(0, 5)),
        (5, lambda: flag.resume(0)),
        (FULL, lambda: flag.share(0, FULL)),
    ):
        act()
        torch.cuda.synchronize()
        assert flag.words.tolist() == [value, FULL]

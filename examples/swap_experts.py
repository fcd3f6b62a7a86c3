"""Swap the experts of a Hugging Face model, and let one request overtake another inside a layer.

python examples/swap_experts.py [FOLDER]      a local MoE model; a tiny one of random weights without it
"""

import sys
import threading
import time

import torch

from qllm_ops import PriorityFlag
from qllm_ops.models import install, load, make_preset, preemptible

model = load(sys.argv[1]) if len(sys.argv) > 1 else make_preset("tiny")
device = model.get_input_embeddings().weight.device
ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (1, 400), device=device)

parked = threading.Event()
flag = PriorityFlag(device, on_event=lambda kind, *_: kind == "park" and parked.set())
print(install(model, flag, priority=0))  # from now on its experts listen to the flag

with torch.inference_mode():
    expected = model(ids).logits


def patient() -> None:
    with torch.inference_mode():  # thread-local, like the current stream
        results.append(model(ids).logits)


results: list[torch.Tensor] = []
flag.pause(0)  # before it starts, so that it must stop at its first layer
thread = threading.Thread(target=patient)
thread.start()
parked.wait(30)
start = time.perf_counter()
with torch.inference_mode(), preemptible(None):  # this thread's passes are not paused
    model(ids[:, :8])
print(
    f"an urgent pass took {(time.perf_counter() - start) * 1e3:.1f} ms while a patient one stood in a layer"
)
flag.resume(0)
thread.join()
print("the patient one's logits, bit for bit:", torch.equal(results[0], expected))
assert torch.equal(results[0], expected)

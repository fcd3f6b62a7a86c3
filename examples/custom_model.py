"""A hand-written MoE block on `qllm_ops.moe`: a router, experts that can be paused, and torch.compile.

python examples/custom_model.py
"""

import threading

import torch
from torch import nn

import qllm_ops


class MoeBlock(nn.Module):
    """Top-k routing over SwiGLU experts, (T, H) to (T, H)."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int):
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.top_k = top_k

    def forward(
        self, hidden_states: torch.Tensor, flag: qllm_ops.PriorityFlag | None = None, priority: int = 0
    ) -> torch.Tensor:
        weights, index = self.router(hidden_states).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return hidden_states + qllm_ops.moe(
            hidden_states, self.gate_up_proj, self.down_proj, index, weights, flag=flag, priority=priority
        )


device = "cuda" if torch.cuda.is_available() else "cpu"
block = MoeBlock(256, 512, num_experts=8, top_k=2).to(device).eval()
flag = qllm_ops.PriorityFlag(device)
long, short = torch.randn(4096, 256, device=device), torch.randn(8, 256, device=device)

with torch.inference_mode():
    expected = block(long)
    # Kernels are loaded before anything can be paused: loading one waits for the whole device.
    index = torch.zeros(1, block.top_k, dtype=torch.int64, device=device)
    qllm_ops.warm_up(
        long[:1], block.gate_up_proj, block.down_proj, index, torch.ones_like(index) / 2, flag=flag
    )

results = []


def patient() -> None:
    with torch.inference_mode():
        results.append(block(long, flag, priority=0))


thread = threading.Thread(target=patient)
thread.start()
for _ in range(20):
    with torch.inference_mode(), flag.urgent(1):  # pauses every class below 1, whatever happens inside
        block(short, flag, priority=1)
thread.join()
print("overtaken 20 times, the same bits:", torch.equal(results[0], expected))
assert torch.equal(results[0], expected)

with torch.inference_mode():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    print("one graph, the same bits:", torch.equal(compiled(long), expected))

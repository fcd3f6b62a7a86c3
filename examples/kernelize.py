"""Swap a model's experts through the `kernels` library instead of `install`.

pip install kernels       in the version that your transformers takes; needs nothing else
python examples/kernelize.py
"""

import torch
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qllm_ops import PriorityFlag
from qllm_ops.models import KERNELS_LAYER, make_preset, preemptible

model = make_preset("tiny")  # or a Mixtral of your own
ids = torch.arange(100)[None]
with torch.inference_mode():
    expected = model(ids).logits

# A name for the library to find the class by. gpt-oss' block has one already: MegaBlocksMoeMLP.
replace_kernel_forward_from_hub(MixtralExperts, "Experts")
ours = LocalLayerRepository(repo_path=KERNELS_LAYER, layer_name="Experts")
with use_kernel_mapping({"Experts": {model.device.type: {Mode.INFERENCE: ours}}}, inherit_mapping=False):
    model = kernelize(model, mode=Mode.INFERENCE, device=model.device.type)

flag = PriorityFlag(model.device)
with torch.inference_mode(), preemptible(flag, priority=0) as preemption:  # `install` is not needed
    got = model(ids).logits
error = ((got - expected).abs().max() / expected.abs().max()).item()
print(f"kernelized; the logits differ by {error:.1e} of the largest one")
assert error <= 1e-5

"""Layers whose forward takes the place of another module's: ``self`` is that module, with its weights.

`kernelize` demands that they have no state, no constructor and no other method.
"""

from torch import Tensor, nn

from qllm_ops.models.experts import experts_forward


class Experts(nn.Module):
    """For every experts class that transformers' experts interface knows, whatever implementation is set."""

    has_backward = False
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, K), (T, K) -> (T, H)"""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class MegaBlocksMoeMLP(nn.Module):
    """For gpt-oss' MoE block, which transformers gives out for replacement under this name."""

    has_backward = False
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, H) -> (B, S, H), and the router's weights (B * S, K)"""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.router(tokens)
        return experts_forward(self.experts, tokens, top_k_index, top_k_weights).view_as(
            hidden_states
        ), top_k_weights

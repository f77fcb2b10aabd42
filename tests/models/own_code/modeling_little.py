"""An architecture that transformers does not know, written as published ones are: its own attention, its own mask."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_little import LittleConfig


def slopes(heads):
    return 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float32)


class LittleAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("slopes", slopes(self.heads), persistent=False)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(hidden_states).chunk(3, dim=-1)
        )
        places = torch.arange(length, device=hidden_states.device)
        distance = (places[:, None] - places[None]).to(query.dtype)
        mask = (-self.slopes.to(query.dtype)[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class LittleLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.before = nn.LayerNorm(config.hidden_size)
        self.attention = LittleAttention(config)
        self.between = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(self.before(hidden_states))
        return hidden_states + self.down(functional.gelu(self.up(self.between(hidden_states))))


class LittlePreTrainedModel(PreTrainedModel):
    config_class = LittleConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.02)
        if isinstance(module, LittleAttention):
            module.slopes.copy_(slopes(module.heads))


class LittleModel(LittlePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LittleLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class LittleForCausalLM(LittlePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LittleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden_states = self.model(input_ids, attention_mask, position_ids, use_cache)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))

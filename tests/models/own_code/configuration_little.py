"""The config of an architecture that transformers does not know; its code lies beside the weights."""

from transformers import PretrainedConfig


class LittleConfig(PretrainedConfig):
    model_type = "little"

    def __init__(self, vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = 512
        super().__init__(**kwargs)

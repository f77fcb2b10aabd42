"""What an extension is for: after as many steps, less loss for each byte of text of the new script."""

import json
import math

import numpy as np
import pytest
from tests.vocabulary.languages import KINDS, SCRIPTS
from transformers import AutoTokenizer

from oomless.config import TrainConfig
from oomless.data.prepare import prepare
from oomless.training import loop

CASES = [(kind, script) for kind in KINDS for script in SCRIPTS]


def bits_per_byte(config):
    """Train, and return the loss of the held-out text in bits for each of its bytes."""
    result = loop.train(config)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    ((name, blocks),) = prepare(config, tokenizer).evaluation.items()
    sizes = np.diff(blocks.ends, prepend=0) + 1
    spans = zip(blocks.starts.tolist(), sizes.tolist(), strict=True)
    texts = [tokenizer.decode(blocks.store.tokens[a : a + n].tolist(), skip_special_tokens=True) for a, n in spans]
    lines = (loop.Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    loss = [found for line in lines if (found := json.loads(line).get(f"eval_loss/{name}")) is not None][-1]
    return loss * blocks.targets / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("kind", "script"),
    [pytest.param(*case, marks=pytest.mark.slow if case == CASES[0] else pytest.mark.full_length) for case in CASES],
)
def test_it_learns_more_in_as_many_steps(model_of, text_of, tmp_path, record_property, kind, script):
    usual = dict(max_seq_length=64, per_device_train_batch_size=4, max_steps=300, learning_rate=3e-3, dtype="fp32")
    found = {}
    for count in (None, 300):
        places = dict(model=str(model_of(kind)), data=str(text_of(script)), output_dir=str(tmp_path / f"{count}"))
        settings = dict(gpu="cpu", eval_fraction=0.05, logging_steps=100, extend_tokenizer=count)
        found[count] = bits_per_byte(TrainConfig.from_mapping({**places, **usual, **settings}))
        record_property(f"thousandths of a bit per byte with {count} new tokens", round(1000 * found[count]))
    print(kind, script, found)
    assert found[300] < found[None]

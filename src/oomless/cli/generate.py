"""``oomless generate``."""

from __future__ import annotations

import sys
from json import dumps
from typing import Annotated

import typer

from oomless.cli.options import OfBase, OfCheckpoint, Trained
from oomless.errors import ConfigError


def generate(
    run: Trained,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The text to go on from; may be given again. - reads standard input.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    checkpoint: OfCheckpoint = None,
    base: OfBase = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Show how the model that was trained goes on from a text, as it is made. It runs on the CPU; adapters are merged as an export does.

    Example: oomless generate runs/first --prompt "def main("
    """
    if not prompt:
        raise ConfigError('there is nothing to go on from: give --prompt "some text", or --prompt - for standard input')
    if prompt.count("-") > 1:
        raise ConfigError("--prompt - reads standard input, which can be read once: give it once")

    from oomless.cli.voice import aside, out, say_notes
    from oomless.export.generate import Sampling, Speaker
    from oomless.export.source import find

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    source = find(run, checkpoint, base)
    say_notes(source.base)
    speaker = Speaker(source)
    made = []
    for text, ids in [(text, speaker.ids(text, chat=chat)) for text in prompts]:
        if json:
            made.append({"prompt": text, "text": speaker.go_on(ids, sampling, lambda piece: None)})
            continue
        aside().print(text, style="dim", soft_wrap=True)
        speaker.go_on(ids, sampling, out().stream)
        out().stream("\n")
    if json:
        out().out(dumps({"model": source.name, "generated": made}, indent=2))

"""``oomless generate``."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from oomless.cli.options import OfBase, OfCheckpoint, OfGpu, Prompts, Trained, prompts_of
from oomless.errors import ConfigError


def generate(
    run: Trained,
    prompt: Prompts = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    checkpoint: OfCheckpoint = None,
    base: OfBase = None,
    gpu: OfGpu = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Show how the model that was trained goes on from a text, as it is made. Adapters are merged as an export does.

    Example: oomless generate runs/first --prompt "def main("
    """
    if not prompt:
        raise ConfigError('there is nothing to go on from: give --prompt "some text", or --prompt - for standard input')
    prompts = prompts_of(prompt)

    from oomless.cli.voice import aside, out, say_notes
    from oomless.export.generate import Sampling, Speaker, ids_of
    from oomless.export.hugging_face import tokenizer_of
    from oomless.export.merged import Merged
    from oomless.export.room import Room
    from oomless.export.source import find
    from oomless.report.compare import print_room
    from oomless.training.assemble import open_device

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    device, source = open_device(gpu), find(run, checkpoint, base)
    say_notes(source.base.notes_read())
    tokenizer, merged = tokenizer_of(source), Merged(source)
    ids = [ids_of(tokenizer, text, chat=chat) for text in prompts]
    room = Room(merged, tokenizer, device, prompts=ids, sampling=sampling)
    room.require()
    print_room(aside(), room)
    made = []
    with device.active():
        speaker = Speaker(merged, tokenizer, device)
        for text, tokens in zip(prompts, ids, strict=True):
            if json:
                made.append({"prompt": text, "text": speaker.go_on(tokens, sampling)})
                continue
            aside().print(text, style="dim", soft_wrap=True)
            speaker.go_on(tokens, sampling, out().stream)
            out().stream("\n")
    if json:
        out().out(dumps({"model": source.name, "generated": made}, indent=2))

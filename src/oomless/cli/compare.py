"""``oomless compare``."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from oomless.cli.options import OfBase, OfCheckpoint, OfGpu, Prompts, Trained, prompts_of


def compare(
    run: Trained,
    prompt: Prompts = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to make for each prompt.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's turn in the chat template.")] = False,
    loss: Annotated[
        bool, typer.Option("--loss/--no-loss", help="Measure the loss of the text that the run held out.")
    ] = True,
    max_eval_blocks: Annotated[
        int | None,
        typer.Option(
            help="Of each source measure at most so many blocks, spread evenly. [default: as the run]",
            show_default=False,
        ),
    ] = None,
    checkpoint: OfCheckpoint = None,
    base: OfBase = None,
    gpu: OfGpu = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Show what training changed: the loss of held-out text by source, and greedy text, of the model before and after, side by side.

    One of the two is in memory at a time. Example: oomless compare runs/first --prompt "def main("
    """
    prompts = prompts_of(prompt or [])

    from oomless.cli.voice import aside, out, say_notes
    from oomless.export.compare import Pair
    from oomless.export.generate import Sampling
    from oomless.report.compare import print_comparison, print_room
    from oomless.report.export import exporting
    from oomless.training.assemble import open_device

    with exporting(aside()) as say:
        pair = Pair(
            run,
            prompts,
            sampling=Sampling(max_new_tokens=max_new_tokens),
            chat=chat,
            which=checkpoint,
            base=base,
            held_out=loss,
            most_blocks=max_eval_blocks,
            device=open_device(gpu),
            say=say,
        )
    say_notes(pair.begun.base.notes_read())
    room = pair.room()
    room.require()
    print_room(aside(), room)
    with exporting(aside()) as pair.say:
        found = pair.compare()
    if json:
        out().out(dumps(found.to_dict(), indent=2))
    else:
        print_comparison(out(), found)

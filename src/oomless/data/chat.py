"""Chats and instructions: records to tokens, and which of these are learnt.

What a record is follows from its keys:

    messages                          role and content of each turn; ``tools`` beside it
    conversations                     from and value of each turn, as ShareGPT writes them
    prompt, completion                two texts, read as they are, or two lists of turns
    instruction, output (or response) one turn each; ``input`` (or context) follows the instruction

Turns become text through the chat template. Which tokens are the assistant's is what the template marks as generated. Where
it marks nothing, an answer is what its turn adds behind the prompt that asks for it: the chat is rendered up to the answer,
with the template's own prompt for one, and again with it. Some templates write an earlier answer in another way than the
last one (they leave out its reasoning, say); such an answer, as the model would have to give it, is a document of its own.

An answer is learnt with the token that ends it. Where the template has none, a document that ends in an answer gets eos_token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oomless.data.encode import BATCH_CHARACTERS, Encoder
from oomless.errors import ConfigError, DataError

Message = dict[str, Any]
Span = tuple[int, int]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
_ROLES |= {"observation": "tool", "function": "tool"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_NO_TOOLS = (
    "{% if tools or messages | selectattr('tool_calls', 'defined') | list %}"
    "{{ raise_exception('it has no place for tools: name the chat_template of a model that has') }}{% endif %}"
)
_PLAIN = (
    _NO_TOOLS + "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Assistant:' + ' ' + message.content + eos_token + '\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_CHATML = (
    _NO_TOOLS + "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"plain": _PLAIN, "chatml": _CHATML}
"""For base models: roles in words, where an answer begins with a space, since a prompt that ended in one would be cut into other
tokens than the two together, and ends with eos_token; and the one with ``<|im_start|>`` and ``<|im_end|>``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One record: turns, or a prompt and what completes it."""

    where: str
    form: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    learnt_from: int = 0
    """The first message that may be learnt."""
    pair: tuple[str, str] | None = None


def load_template(name: str) -> str:
    """Return the chat template called ``name``, in the file ``name``, or of the tokenizer there.

    Raises:
        ConfigError: there is none, or it is no template.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: Any = TEMPLATES.get(name)
    if template is None and Path(name).is_file():
        try:
            template = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the chat template {name} cannot be read: {error}", "chat_template") from error
    elif template is None:
        from transformers import AutoTokenizer

        try:
            template = AutoTokenizer.from_pretrained(name).chat_template
        except Exception as error:  # every tokenizer class raises its own
            raise ConfigError(
                f"chat_template must be {', '.join(TEMPLATES)}, a file, or a tokenizer's folder or name; got {name!r}",
                "chat_template",
            ) from error
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise ConfigError(
            f"the tokenizer {name} has no chat template: name another, or plain or chatml", "chat_template"
        )
    try:
        _compile_jinja_template(template)
    except TemplateError as error:
        raise ConfigError(f"the chat template {name} is no Jinja template: {error}", "chat_template") from error
    return template


# Records to turns


def form_of(names: Iterable[str]) -> str | None:
    """Return which form of chat a record with the fields ``names`` has, if it is one."""
    return next((form for form, (needed, _, _) in _FORMS.items() if needed(set(names))), None)


def fields_of(form: str, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that a record of this form is made of."""
    return [name for name in names if name in _FORMS[form][1]]


def read(where: str, record: dict[str, Any], form: str) -> Conversation:
    """Return what ``record`` says.

    Raises:
        DataError: a turn lacks its role or text, or is of an unknown role.
    """
    return _FORMS[form][2](where, record)


def _messages(where: str, record: dict[str, Any]) -> Conversation:
    return Conversation(
        where=where,
        form="messages",
        messages=_turns(where, record["messages"], "messages"),
        tools=_tools(where, record),
    )


def _sharegpt(where: str, record: dict[str, Any]) -> Conversation:
    name = "conversations" if "conversations" in record else "conversation"
    turns = record[name]
    if isinstance(turns, list):
        turns = [
            {"role": turn["from"], "content": turn.get("value")} if isinstance(turn, dict) and "from" in turn else turn
            for turn in turns
        ]
        if record.get("system"):
            turns = [{"role": "system", "content": record["system"]}, *turns]
    return Conversation(
        where=where, form="conversations", messages=_turns(where, turns, name), tools=_tools(where, record)
    )


def _completion(where: str, record: dict[str, Any]) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation(where=where, form="prompt and completion", pair=(prompt, completion))
    asked = _turns(where, prompt, "prompt")
    return Conversation(
        where=where,
        form="prompt and completion",
        messages=(*asked, *_turns(where, completion, "completion")),
        tools=_tools(where, record),
        learnt_from=len(asked),
    )


def _instruction(where: str, record: dict[str, Any]) -> Conversation:
    answer = "output" if "output" in record else "response"
    context = record.get("input") or record.get("context") or ""
    for name, value in (("instruction", record["instruction"]), (answer, record[answer]), ("input", context)):
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {name!r} must be text; got {type(value).__name__}")
    asked = record["instruction"] + ("\n\n" + context if context else "")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]
    if record.get("system"):
        turns = [{"role": "system", "content": record["system"]}, *turns]
    return Conversation(where=where, form="instruction and output", messages=_turns(where, turns, "instruction"))


_FORMS: dict[str, tuple[Callable[[set[str]], bool], frozenset[str], Callable[[str, dict[str, Any]], Conversation]]] = {
    "messages": (lambda names: "messages" in names, frozenset(("messages", "tools")), _messages),
    "conversations": (
        lambda names: bool(names & {"conversations", "conversation"}),
        frozenset(("conversations", "conversation", "system", "tools")),
        _sharegpt,
    ),
    "completion": (
        lambda names: {"prompt", "completion"} <= names,
        frozenset(("prompt", "completion", "tools")),
        _completion,
    ),
    "instruction": (
        lambda names: "instruction" in names and bool(names & {"output", "response"}),
        frozenset(("instruction", "input", "context", "output", "response", "system")),
        _instruction,
    ),
}


def _turns(where: str, turns: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise DataError(f"{where}: {name} must be a list of turns; got {type(turns).__name__}")
    return tuple(_turn(f"{where}, turn {number} of {name}", turn) for number, turn in enumerate(turns, start=1))


def _turn(where: str, turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise DataError(f"{where} must be an object with a role and its content; got {str(turn)[:60]}")
    message = {key: value for key, value in turn.items() if value is not None}
    role = message["role"].strip().lower()
    message["role"] = _ROLES.get(role, role)
    if message["role"] not in _KNOWN_ROLES:
        raise DataError(
            f"{where} has the role {turn['role']!r}; known are {', '.join(_KNOWN_ROLES)} (and human, gpt): rename it"
        )
    content = message.setdefault("content", "")
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} must hold text; got {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds U+{ord(content[error.start]):04X}, half of a character: correct it") from error
    message["content"] = content
    return message


def _part(where: str, part: Any) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise DataError(f"{where} holds {kind!r}, and only text can be learnt: leave such records out")
    return text


def _tools(where: str, record: dict[str, Any]) -> tuple[Any, ...]:
    tools = record.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise DataError(f"{where}: tools is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects; got {str(tools)[:60]}")
    return tuple(tools)


# Turns to tokens


class ChatEncoder:
    """Encodes chats with a tokenizer's template."""

    def __init__(self, tokenizer: Any, encoder: Encoder, loss_on: str) -> None:
        self.encoder, self.loss_on = encoder, loss_on
        self.template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        if isinstance(tokenizer.chat_template, dict):
            self.template = tokenizer.chat_template.get("default")
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        specials = sorted(
            (t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True
        )
        self.specials = re.compile("|".join(map(re.escape, specials))) if specials else None
        self.calls_tools = "tool" in (self.template or "")
        self.marked = self.template is not None and _MARKS.search(self.template) is not None

    @property
    def facts(self) -> list[Any]:
        """What the tokens rest on, beside the tokenizer."""
        return [self.template, self.loss_on, sorted(self.special_tokens.items())]

    def documents(
        self, conversations: Iterable[Conversation], dtype: type[np.unsignedinteger[Any]], notes: Counter[str]
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the ids of each document, and which of them are learnt."""
        batch: list[tuple[str, list[Span], bool]] = []
        waiting = 0
        for conversation in conversations:
            notes[f"read as {conversation.form}"] += 1
            notes.update([_NO_TOOLS_TOLD] if conversation.tools and not self.calls_tools else [])
            for text, spans in self._texts(conversation, notes):
                batch.append((text, spans, conversation.pair is not None))
                waiting += len(text)
            if waiting >= BATCH_CHARACTERS:
                yield from self._encode(batch, dtype, notes)
                batch, waiting = [], 0
        yield from self._encode(batch, dtype, notes)

    def _encode(
        self, batch: list[tuple[str, list[Span], bool]], dtype: type[np.unsignedinteger[Any]], notes: Counter[str]
    ) -> Iterator[tuple[Any, Any]]:
        encodings = self.encoder.tokenizer.encode_batch([text for text, _, _ in batch], add_special_tokens=False)
        for (_, spans, plain), encoding in zip(batch, encodings, strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            begins, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
            learnt = np.zeros(len(begins), dtype=np.bool_)
            for begin, end in spans:
                learnt |= (begins < end) & (ends > begin)
            ids = encoding.ids
            start = self.encoder.start if plain else []
            ended = not plain and not (learnt[-1] and self.special_ids.isdisjoint(ids[-2:]))
            if not plain and not ended:
                notes["answers ended by eos_token, because the chat template ends them by nothing"] += 1
            ids = [*start, *ids, *([] if ended else [self.encoder.eos])]
            learnt = np.array([*[False] * len(start), *learnt, *([] if ended else [True])], dtype=np.bool_)
            yield np.array(ids, dtype=dtype), learnt

    def _texts(self, conversation: Conversation, notes: Counter[str]) -> Iterator[tuple[str, list[Span]]]:
        """Yield the text of each document that ``conversation`` is, and which characters of it are learnt."""
        contents = conversation.pair or [message["content"] for message in conversation.messages]
        if self.specials is not None and any(self.specials.search(content) for content in contents):
            notes["chats whose text holds special tokens, read as such"] += 1
        if conversation.pair is not None:
            prompt, completion = conversation.pair
            if not completion:
                notes[_NO_ANSWER] += 1
                return
            yield prompt + completion, [(0 if self.loss_on == "all" else len(prompt), len(prompt) + len(completion))]
            return
        messages = list(conversation.messages)
        turns = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and number >= conversation.learnt_from
        ]
        if any(not message["content"].strip() and not message.get("tool_calls") for message in messages):
            notes["chats left out, a turn is empty"] += 1
        elif not turns:
            notes[_NO_ANSWER] += 1
        elif self.loss_on == "all":
            text, _ = self._render(conversation, messages)
            yield text, [(0, len(text))]
        else:
            if self.loss_on == "completion" and not conversation.learnt_from:
                turns = turns[-1:]
            yield from self._answers(conversation, messages, turns, notes)

    def _answers(
        self, conversation: Conversation, messages: list[Message], turns: list[int], notes: Counter[str]
    ) -> Iterator[tuple[str, list[Span]]]:
        whole, marks = self._render(conversation, messages)
        if self.marked:
            if any(message["role"] == "assistant" for message in messages[: turns[0]]):  # only later ones are learnt
                before, _ = self._render(conversation, messages[: turns[0]], asks=True)
                marks = [mark for mark in marks if mark[1] > _common(before, whole)]
            yield whole, marks
            return
        spans: list[Span] = []
        for turn in turns:
            behind = whole if turn == len(messages) - 1 else self._render(conversation, messages[: turn + 1])[0]
            before = (
                self._render(conversation, messages[:turn], asks=True)[0]
                if turn
                else self._opening(conversation, behind)
            )
            span = self._span(conversation, messages, turn, before, behind, whole)
            if span is not None:
                spans.append(span)
                continue
            alone = self._span(conversation, messages, turn, before, behind, behind)
            if alone is None:
                raise DataError(
                    f"{conversation.where}: the chat template writes an answer in another way than it asks for one, so that the "
                    "answer cannot be told from the rest: mark it in the template by {% generation %}, or set loss_on: all"
                )
            notes["answers as documents of their own, because the chat template rewrites earlier ones"] += 1
            yield behind, [alone]
        if spans:
            yield whole, spans

    def _opening(self, conversation: Conversation, behind: str) -> str:
        """Return what the template writes before an answer that nothing precedes, by writing another answer."""
        other, _ = self._render(conversation, [{"role": "assistant", "content": "\0"}])
        return behind[: _common(behind, other)].rstrip(" ")  # a space goes with the word behind it

    def _span(
        self, conversation: Conversation, messages: list[Message], turn: int, before: str, behind: str, whole: str
    ) -> Span | None:
        """Return which characters of ``whole`` are the answer that ``behind`` adds to ``before``; ``None`` if it is not there."""
        if behind.startswith(before) and whole.startswith(behind):
            return len(before), len(behind)
        bare = self._render(conversation, messages[:turn])[0] if turn else before
        encodings = self.encoder.tokenizer.encode_batch([before, behind, whole, bare], add_special_tokens=False)
        prompt_ids, answered_ids, whole_ids, bare_ids = (encoding.ids for encoding in encodings)
        begin, end = _common(prompt_ids, whole_ids), _common(answered_ids, whole_ids)
        asked = begin == len(prompt_ids) or begin >= _common(bare_ids, prompt_ids)
        if not asked or end <= begin or not self.special_ids.issuperset(answered_ids[end:]):
            return None
        offsets = encodings[2].offsets
        return offsets[begin][0], offsets[end - 1][1]

    def _render(
        self, conversation: Conversation, messages: list[Message], *, asks: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of ``messages``, and what the template marks in it; ``asks`` for an answer at the end."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None:
            raise DataError(
                f"{conversation.where} is a chat, and the tokenizer has no chat template: set chat_template to plain, chatml, a "
                "file with one, or a tokenizer that has one"
            )
        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                tools=list(conversation.tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=asks,
                **self.special_tokens,
            )
        except Exception as error:  # a template raises whatever it likes
            raise DataError(
                f"{conversation.where}: the chat template refuses it: {error} (its roles are "
                f"{', '.join(message['role'] for message in messages)})"
            ) from error
        return texts[0], [tuple(mark) for mark in marks[0]] if self.marked else []


_NO_TOOLS_TOLD = "chats whose tools are left out, because the chat template has no place for them"
_NO_ANSWER = "chats left out, no answer to learn"


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how far the two are the same from their start."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )

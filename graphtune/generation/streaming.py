"""Text as its tokens arrive: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns the ids of one answer into pieces of text that add up to the text of all of them.

    A token may be part of a character, and what decoders write for a token may depend on the one
    before. So text is held back while it ends in half a character, and tokens are decoded with
    those before them, back to where text was whole the last time but one. What might be the
    beginning of a stop string is held back too.

    Attributes:
        text: what was given out.
        stopped: whether a stop string came; the text ends before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Iterable[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.text = ""
        self.stopped = False
        self._held = ""
        self._ids: list[int] = []
        self._before = 0  # where the tokens begin with which the next are decoded
        self._whole = 0  # how many tokens have been turned into text

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, perhaps none."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(_HALF):
            return ""
        return self._advance(new)

    def finish(self) -> str:
        """What is left at the end of the answer, half characters included."""
        piece = self._advance(self._new_text())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _advance(self, new: str) -> str:
        if not new or self.stopped:
            return ""
        self._before, self._whole = self._whole, len(self._ids)
        text = self._held + new
        ends = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        certain = min(ends) if ends else len(text) - self._begun(text)
        piece, self._held = text[:certain], "" if ends else text[certain:]
        self.text += piece
        return piece

    def _begun(self, text: str) -> int:
        """How much of the end of a text may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop_strings):
                return size
        return 0

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._before : self._whole])
        return self._decode(self._ids[self._before :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

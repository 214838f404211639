r"""Which option of a multiple-choice problem a response commits to: its letter, or its text.

Read in this order: the last `\boxed{...}`, `<answer>...</answer>`, a response that is no more than an option, and the
last statement of an answer ("the answer is (B)", "**Answer:** C", "option C is correct"). A statement that is
hypothetical or denied, that names several letters, or after which another letter is named, commits to nothing.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from vold.grading.equality import Decision, Undecided, decide
from vold.grading.extract import after_thinking, extract_answer
from vold.grading.normalise import normalise
from vold.grading.units import quantity

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_DECORATION = re.compile(
    r"\*\*|__|\$|`|\"|[“”‘’「」]|(?<![A-Za-z])'|'(?![A-Za-z])|\\\(|\\\)|\\[,;! ]|(?<=\W)\*|\*(?=\W)"
)
_TEXT_GROUP = re.compile(r"\\(?:text(?:bf|rm|it|sf|tt)?|math(?:rm|bf|sf|it)|mbox|boldsymbol)\s*\{([^{}]*)\}")
_BRACKETED = r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|\{\s*([A-Za-z])\s*\}|([A-Za-z]))"
_OPTION = re.compile(
    rf"(?i:(?:option|choice|answer)\s+)?{_BRACKETED}(?:\s*[.):,;–—-]+\s*|\s+|(?<=[)\]}}])\s*|$)(.*)", re.DOTALL
)
_LETTER = r"(?:option|choice|letter)?\s*(?:[(\[{]\s*([A-Za-z])\s*[)\]}]|([A-Za-z]))(?![A-Za-z0-9'])"
_CAPITAL = r"[(\[]?((?-i:[A-Z]))[)\]]?"
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:answer|choice|option)\b\s*(?:is|are|would be|must be|should be|[:=：–—-])+\s*(?:is|:|-)?\s*"
        r"(?:clearly |therefore |thus |hence )?" + _LETTER,
        r"(?:答案|选项|选|應選|应选)\s*(?:应该|應該)?\s*(?:是|为|為|选|：|:)*\s*[(（]?([A-Za-z])[)）]?(?![A-Za-z0-9])",
        r"\b(?:option|choice|answer)\s*[(\[]?([A-Za-z])[)\]]?\s+(?:is|must be)\s+(?:the\s+)?"
        r"(?:correct|right|answer|best|true|one)\b",
        rf"(?<![A-Za-z]){_CAPITAL}\s+is\s+(?:the\s+)?(?:correct|right|best|final)?\s*"
        r"(?:answer|choice|option|correct|right)\b",
        r"\b(?:i|we)\s+(?:would\s+|will\s+)?(?:choose|pick|select|go with)\s+(?:the\s+)?"
        rf"(?:option\s+|choice\s+|answer\s+)?{_CAPITAL}(?![A-Za-z0-9])",
    )
)
_DOUBT = re.compile(
    r"\b(?:if|suppose|assum\w+|when|unless|whether|could|might|may|maybe|perhaps|possibly|would|not|never|neither|either|"
    r"wrong|incorrect|false|cannot|can't|isn't|wasn't|doesn't|don't|n't|nor|were|imagine|consider|guess|unlikely|doubt\w*|"
    r"hardly|no longer|rather than|instead of|except|but)\b|如果|假如|假设|不是|不|若|或|可能|也许|错|\?",
    re.IGNORECASE,
)
_OTHER_LETTER = r"(?<![A-Za-z\\'])[(\[{]?[%s][)\]}]?(?![A-Za-z0-9'])"
_ARTICLE = re.compile(r"(?:(?<=[.!?]\s)|(?<=\n)|^)A(?= [a-z]{2,})")
_SENTENCE_END = re.compile(r"[.!?。！？]\s|\n|[。！？]")
_MAX_BARE = 400


@dataclass(frozen=True)
class Choice:
    """answer: what the response says; letter: the option named, "" where only its text is given; text: the option's
    text, "" where only its letter is given."""

    answer: str
    letter: str
    text: str
    choices: tuple[str, ...]

    def against(self, gold: str) -> Decision | Undecided:
        """Right where the letter is the gold letter and the text, if there is one, that option's text alone."""
        letters = string.ascii_uppercase[: len(self.choices)]
        gold_letter = gold.strip().strip("()[]. ").upper()
        if len(gold_letter) != 1 or gold_letter not in letters:
            return decide(self.answer, gold)
        if self.letter and self.letter != gold_letter:
            return False, "choice"
        if not self.text:
            return bool(self.letter), "choice"
        right = self.choices[letters.index(gold_letter)]
        outcome = _same_text(self.text, right)
        others = [choice for choice in self.choices if choice and choice != right]
        if any(
            _same_text(self.text, other) == (True, "choice") or _lacks_unit_of(self.text, other) for other in others
        ):
            return False, "choice"
        return outcome


def choose(response: str, choices: tuple[str, ...]) -> Choice | None:
    """The option that a response commits to, None where it commits to none."""
    conclusion = after_thinking(response)
    if conclusion is None or not choices:
        return None
    boxed = extract_answer(response)
    if boxed is not None:
        return _option(boxed, choices)
    if "\\boxed" in conclusion:
        return None
    if tags := _ANSWER_TAG.findall(conclusion):
        return _option(tags[-1], choices) if len(tags) == 1 else None
    whole = conclusion.strip()
    if len(whole) <= _MAX_BARE and (alone := _option(whole, choices)) and _is_no_more_than_an_option(alone):
        return alone
    return _stated(_plain(conclusion), choices)


def _is_no_more_than_an_option(choice: Choice) -> bool:
    if not choice.text:
        return True
    return any(_same_text(choice.text, text) == (True, "choice") for text in choice.choices)


def _plain(text: str) -> str:
    text = _DECORATION.sub("", text)
    while (replaced := _TEXT_GROUP.sub(r"\1", text)) != text:
        text = replaced
    return text.strip()


def _letters(choices: tuple[str, ...]) -> str:
    """The letters of the options: of those with a text, where any has one."""
    letters = string.ascii_uppercase[: len(choices)]
    with_text = [letter for letter, text in zip(letters, choices, strict=False) if text.strip()]
    return "".join(with_text) or letters


def _option(text: str, choices: tuple[str, ...]) -> Choice | None:
    """The option that `text` consists of: its letter, its letter and text, or its text."""
    letters = _letters(choices)
    plain = re.sub(
        r"^(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:=]?\s*(?=\S)",
        "",
        _plain(text),
        flags=re.I,
    )
    plain = plain.strip().rstrip(" .,;。")
    is_text = any(_same_text(text, choice) == (True, "choice") for choice in choices)
    match = _OPTION.fullmatch(plain)
    if match:
        letter, rest = next(group for group in match.groups()[:4] if group), match[5].strip()
        is_letter = letter.upper() in letters and (letter.isupper() or not is_text)
        if is_letter and (not rest or not is_text):
            return Choice(plain if rest else letter.upper(), letter.upper(), rest, choices)
    if not plain:
        return None
    return Choice(text.strip(), "", text.strip(), choices)


def _stated(text: str, choices: tuple[str, ...]) -> Choice | None:
    """The option of the last statement, if nothing takes it back."""
    letters = _letters(choices)
    matches = [match for pattern in _STATEMENTS for match in pattern.finditer(text)]
    matches = [match for match in matches if _letter(match) in letters]
    if not matches:
        return None
    last = max(matches, key=lambda match: match.end(match.lastindex or 0))
    letter, end = _letter(last), last.end(last.lastindex or 0)
    start = max((found.end() for found in _SENTENCE_END.finditer(text, 0, last.start())), default=0)
    before, after = text[start : last.start()], text[end:]
    sentence = after[: found.end()] if (found := _SENTENCE_END.search(after)) else after
    stated = last[0]
    if (
        _DOUBT.search(before)
        or _DOUBT.search(stated)
        or re.search(r"\b(?:wrong|incorrect|not|false)\b|\?|^\s*(?:or|and|/|&)\b", sentence)
    ):
        return None
    if _names_another(_ARTICLE.sub("", after), letter, letters):
        return None
    if (
        re.match(r"\s+[a-z]+", after)
        and letter == "A"
        and not re.match(r"\s+(?:is|because|since|as|for|which|given|by|due)\b", after)
    ):
        return None  # the answer is A triangle
    return Choice(letter, letter, "", choices)


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _names_another(text: str, letter: str, letters: str) -> bool:
    others = letters.replace(letter, "")
    return bool(others) and re.search(_OTHER_LETTER % others, text) is not None


def _lacks_unit_of(text: str, choice: str) -> bool:
    ours, theirs = quantity(normalise(text)), quantity(normalise(choice))
    return not ours.unit and bool(theirs.unit) and ours.value == theirs.value


def _same_text(text: str, choice: str) -> Decision | Undecided:
    """`text` against an option's text; where two options differ by their unit alone, the unit counts."""
    if normalise(text) == normalise(choice):
        return True, "choice"
    outcome = decide(text, choice) if normalise(choice) else (False, "choice")
    return (outcome[0], "choice") if isinstance(outcome, tuple) else outcome

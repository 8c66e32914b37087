"""Decides which columns of a data set hold what: as the user says, or as their names tell."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tangora._checks import InputError, check_choice
from tangora.training.data.images import IMAGE, PIXELS, StoredImage
from tangora.training.data.readers import RawData, listed
from tangora.training.models import Kind

# fmt: off
_TEXTS = (
    "text", "sentence", "review", "content", "body", "comment", "message", "tweet", "post", "document", "article",
    "passage", "description", "headline", "title", "utterance", "abstract", "transcript",
)
_LABELS = (
    "label", "labels", "sentiment", "class", "category", "target", "stars", "rating", "intent", "topic", "emotion",
    "polarity", "tag", "genre",
)
# fmt: on
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "passage"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
_CHATS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "user")
_COMPLETIONS = ("completion", "response", "output", "solution", "answer", "assistant")
_CONTEXTS = ("input", "context")
_NO_TEXTS = {*_LABELS, *_CHATS, *_PROMPTS, *_COMPLETIONS}
_LONGEST_NAME = 60
_NUMBERING = re.compile(r"|index|idx|id|.*_(id|idx)|unnamed:_\d+")


@dataclass(frozen=True)
class Columns:
    """Names of the columns, as far as the user gave them.

    ``a|b`` is the first of these that a data set has, for data sets from different places; ``a,b`` as ``text`` is a
    pair of texts to be classified. Case and blanks around a name do not matter.
    """

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Layout:
    """The columns of a data set by their role."""

    kind: Kind
    text: tuple[str, ...] = ()  # one, or two of a pair
    label: str | None = None
    prompt: str | None = None
    context: str | None = None  # the ``input`` of an instruction, which may be empty
    completion: str | None = None
    chat: str | None = None  # conversations
    image: str | None = None  # of images that are classified in place of texts

    def sentence(self, present: Sequence[str]) -> str:
        """Return a sentence that lists the columns by their role, and those that are not used."""
        roles = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        used = {
            role: (name,) if isinstance(name, str) else tuple(name) for role, name in roles.items() if name
        }
        told = ", ".join(f"{role} = {' and '.join(map(repr, names))}" for role, names in used.items())
        taken = {name for names in used.values() for name in names}
        rest = [repr(_short(name)) for name in present if name not in taken]
        return f"columns: {told}" + (f"; not used: {listed(rest)}" if rest else "")


def recognise(data: RawData, given: Columns, kind: Kind | None) -> Layout:
    """Find the columns of a data set.

    What the user names is used. Otherwise a column of labels beside a text, or a pair of texts, makes a
    classification; then come conversations, prompts with completions, and plain text. The usual name of a column
    (``text``, ``label``, ``prompt``, ``completion``) wins over its other names; two of the others are refused.
    """
    _check_given(given, kind)
    finder = _Finder(data, data.columns)
    found = kind or _kind(finder, given)
    layout = _labelled(finder, given) if found == "classification" else _causal(finder, given)
    if kind is None:
        _check_no_label_is_left(data, layout)
    return layout


def _check_given(given: Columns, kind: Kind | None) -> None:
    asked = given.prompt or given.completion
    if given.text and asked:
        raise InputError("pass either text_column, or prompt_column and completion_column; not both")
    if kind == "classification" and asked:
        raise InputError("prompt_column and completion_column are for kind='causal'; use text_column")
    if given.label and (kind == "causal" or asked):
        raise InputError("label_column is for kind='classification'; omit it for 'causal'")


@dataclass(frozen=True)
class _Finder:
    """Looks columns up by name."""

    data: RawData
    present: Sequence[str]

    def named(self, wanted: str, argument: str) -> str:
        """Return the column that the user named."""
        for name in (wanted, *wanted.split("|")):
            if name in self.present:
                return name
        for name in wanted.split("|"):
            if len(near := [column for column in self.present if _plain(column) == _plain(name)]) == 1:
                return near[0]
        check_choice(f"{self.data.name}: {argument}", wanted, [*map(_short, self.present)])
        raise AssertionError

    def known(self, names: Sequence[str], role: str, *, without: Sequence[str] = ()) -> str | None:
        """Return the column with one of the usual names; the first of these wins over the others."""
        columns = [column for column in self.present if column not in without]
        if names[0] in columns:
            return names[0]
        found = [column for column in columns if _plain(column) == names[0]]
        found = found or [column for column in columns if _plain(column) in names]
        # review_text is a text, airline_sentiment a sentiment
        found = found or [column for column in columns if _plain(column).split("_")[-1] in names]
        if len(found) > 1:
            flags = " or ".join(f"--{role}-column {_quoted(column)}" for column in found)
            raise InputError(
                f"{self.data.name}: several columns may be the {role}, {listed(found)}; pass {flags}"
            )
        return found[0] if found else None

    def pair(self) -> tuple[str, ...]:
        """Return two columns whose usual names say that they belong together."""
        plain = {_plain(column): column for column in reversed(self.present)}
        return next((tuple(plain[name] for name in pair) for pair in _PAIRS if plain.keys() >= {*pair}), ())

    def only_other(self, label: str) -> str | None:
        """Return the only column that a label stands beside, numberings left out."""
        others = [c for c in self.present if c != label and not _NUMBERING.fullmatch(_plain(c))]
        return others[0] if len(others) == 1 else None

    def texts(self, given: Columns, label: str | None) -> tuple[str, ...]:
        """Return the column of the text, or two of a pair; none if there is none."""
        if given.text is not None:
            names = given.text.split(",")
            if given.text in self.present or len(names) != 2:
                return (self.named(given.text, "text_column"),)
            return tuple(self.named(name.strip(), "text_column") for name in names)
        if "text" not in self.present and (pair := self.pair()):
            return pair
        without = [label] if label else []
        found = self.known(_TEXTS, "text", without=without) or (self.only_other(label) if label else None)
        return (found,) if found else ()

    def image(self, given: Columns) -> str | None:
        """Return the column of images, unless the user named a column of texts."""
        found = [column for column in self.present if column == PIXELS or self._holds_images(column)]
        if given.text is not None:
            return next((name for name in self.texts(given, None) if name in found), None)
        if len(found) > 1 and IMAGE not in found:
            flags = " or ".join(f"--text-column {_quoted(column)}" for column in found)
            raise InputError(f"{self.data.name}: several columns hold images, {listed(found)}; give {flags}")
        return IMAGE if IMAGE in found else next(iter(found), None)

    def _holds_images(self, column: str) -> bool:
        values = (row.values.get(column) for row in self.data.splits["train"])
        return isinstance(next((value for value in values if value is not None), None), StoredImage)

    def taken(self, given: Columns) -> tuple[str, ...]:
        """Return the columns that the user named as text."""
        return self.texts(given, None) if given.text is not None else ()

    def header(self) -> str:
        """Return a sentence of which columns there are."""
        is_table = self.data.name.lower().endswith((".csv", ".tsv"))
        place = " (from the first line, which must be a header)" if is_table else ""
        return f"its columns{place} are {listed([*map(_quoted, map(_short, self.present))]) or 'none'}"


def _kind(finder: _Finder, given: Columns) -> Kind:
    if given.prompt or given.completion:
        return "causal"
    if given.label:
        return "classification"
    if given.text is None and _exchange(finder) and not _has_text_and_label(finder):
        return "causal"
    label = finder.known(_LABELS, "label", without=finder.taken(given))
    if label and (finder.image(given) or finder.texts(given, label) or label == "label"):
        return "classification"
    return "causal"


def _exchange(finder: _Finder) -> bool:
    """Return whether there are conversations, or prompts with completions."""
    plain = {_plain(column) for column in finder.present}
    return bool(plain & {*_CHATS} or (plain & {*_PROMPTS} and plain & {*_COMPLETIONS}))


def _has_text_and_label(finder: _Finder) -> bool:
    plain = {_plain(column) for column in finder.present}
    return bool(plain & {*_LABELS}) and (bool(plain & {*_TEXTS}) or bool(finder.pair()))


def _labelled(finder: _Finder, given: Columns) -> Layout:
    label = (
        finder.known(_LABELS, "label", without=finder.taken(given))
        if given.label is None
        else finder.named(given.label, "label_column")
    )
    if label in finder.taken(given):
        raise InputError(f"{finder.data.name}: text_column and label_column must differ; both are {label!r}")
    image = finder.image(given)
    texts = () if image else finder.texts(given, label)
    if label is None or not (texts or image):
        missing = [
            f"--{role}-column NAME" for role, found in (("text", texts), ("label", label)) if not found
        ]
        missing = ["--label-column NAME"] if image else missing
        raise InputError(
            f"{finder.data.name}: no column is recognised as the {'label' if texts or image else 'text'} of a "
            f"classification; {finder.header()}; give {' '.join(missing)}"
        )
    return Layout("classification", text=texts, label=label, image=image)


def _causal(finder: _Finder, given: Columns) -> Layout:
    """Return the columns of prompts and completions, of conversations, or of plain text."""
    if given.text is not None:
        return _plain_text(finder, given)
    if given.prompt is None and given.completion is None:
        usual = {"prompt", "completion"} <= {*finder.present}
        chats = [column for column in finder.present if _plain(column) in _CHATS]
        if chats and not usual:
            return Layout("causal", chat=finder.known([_plain(chats[0]), *_CHATS], "prompt"))
        if not usual and not _exchange(finder):
            return _plain_text(finder, given)
    context = None
    if given.prompt is not None:
        prompt = finder.named(given.prompt, "prompt_column")
    else:
        usual = any(_plain(column) == "prompt" for column in finder.present)
        names = _PROMPTS if usual else _PROMPTS[1:]
        prompt = finder.known(names, "prompt", without=[given.completion] if given.completion else [])
        if prompt is not None and _plain(prompt) == "instruction":
            context = next((c for c in finder.present if _plain(c) in _CONTEXTS and c != prompt), None)
    if given.completion is not None:
        completion = finder.named(given.completion, "completion_column")
    else:
        # beside a solution or an output, an answer is the final one alone
        rest = [name for name in _COMPLETIONS if name != "answer"]
        without = [name for name in (prompt, context) if name]
        completion = finder.known(rest, "completion", without=without)
        completion = completion or finder.known(["answer"], "completion", without=without)
    if prompt is None or completion is None:
        missing = "prompt" if prompt is None else "completion"
        raise InputError(
            f"{finder.data.name}: no column is recognised as the {missing}; {finder.header()}; "
            f"give --{missing}-column NAME"
        )
    return Layout("causal", prompt=prompt, context=context, completion=completion)


def _plain_text(finder: _Finder, given: Columns) -> Layout:
    """Return the column of plain text, unless another one looks like its label."""
    if finder.image(given):
        raise InputError("images can only be classified; kind must be 'classification', got 'causal'")
    texts = finder.texts(given, None)
    if not texts and len(finder.present) == 1 and _plain(finder.present[0]) not in _NO_TEXTS:
        texts = (finder.present[0],)
    if len(texts) != 1:
        raise InputError(
            f"{finder.data.name}: no columns are recognised; {finder.header()}; give --text-column NAME "
            "and --label-column NAME to classify texts, --prompt-column NAME and --completion-column "
            "NAME to train on answers, or --text-column NAME and --kind causal to train on plain text"
        )
    return Layout("causal", text=texts)


def _check_no_label_is_left(data: RawData, layout: Layout) -> None:
    """Raise if a language model would be trained on texts beside what looks like their classes."""
    rest = [c for c in data.columns if c not in layout.text and not _NUMBERING.fullmatch(_plain(c))]
    if layout.kind == "classification" or not layout.text or len(rest) != 1:
        return
    values = [str(row.values.get(rest[0])) for row in data.splits["train"]]
    if 1 < len(set(values)) <= len(values) / 2 or all(map(_is_number, values)):
        name = _quoted(rest[0])
        raise InputError(
            f"{data.name}: is {name} the label of {_quoted(layout.text[0])}? give --label-column {name} to classify, "
            "or --kind causal to train a language model on only the texts"
        )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text.strip()) is not None


def _plain(name: str) -> str:
    """Return a column's name as it is compared: without case, blanks around it, and kinds of spaces inside."""
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def _short(name: str) -> str:
    """Return a column's name, or the beginning of one that is a whole text, as in a file without a header."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else repr(name)

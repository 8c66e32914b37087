"""Columns by their names: what is recognised, what the user names, and what is asked for."""

import pytest

from tangora._checks import InputError
from tangora.training.data import load_task
from tangora.training.data.readers import RawData, RawRow
from tangora.training.data.recognise import Columns, recognise
from tests.training.tiny import reviews, write_csv


def layout(columns, kind=None, **given):
    values = [{column: f"{column} {index}" for column in columns} for index in range(8)]
    data = RawData({"train": [RawRow(str(index), each) for index, each in enumerate(values)]}, name="f.csv")
    return recognise(data, Columns(**given), kind)


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ("review,sentiment", "review", "sentiment"),
        ("sentiment,review", "review", "sentiment"),
        ("Text,Label", "Text", "Label"),
        ("text, Label ", "text", " Label "),
        ("id,review,stars", "review", "stars"),
        ("question,label", "question", "label"),
        ("anything at all,class", "anything at all", "class"),
        (",comment,target", "comment", "target"),
        ("Review Text,Category", "Review Text", "Category"),
        ("tweet_id,text,airline_sentiment", "text", "airline_sentiment"),
        ("text,label,label_text", "text", "label"),
        ("text,title,label", "text", "label"),
        ("sentence1,sentence2,label", "sentence1 sentence2", "label"),
        ("idx,Premise,Hypothesis,label", "Premise Hypothesis", "label"),
        ("question,passage,label", "question passage", "label"),
        ("message,response,intent", "message", "intent"),
    ],
)
def test_a_label_beside_a_text_is_classified(columns, text, label):
    found = layout(columns.split(","))
    assert found.kind == "classification"
    assert (" ".join(found.text), found.label) == (text, label)


@pytest.mark.parametrize(
    ("columns", "prompt", "context", "completion"),
    [
        ("prompt,completion", "prompt", None, "completion"),
        ("Prompt,Response", "Prompt", None, "Response"),
        ("question,answer", "question", None, "answer"),
        ("query,response,type", "query", None, "response"),
        ("problem,solution,answer", "problem", None, "solution"),
        ("instruction,input,output", "instruction", "input", "output"),
        ("instruction,context,response,category", "instruction", "context", "response"),
        ("input,output", "input", None, "output"),
        ("prompt,completion,messages", "prompt", None, "completion"),
        ("prompt,completion,label", "prompt", None, "completion"),
    ],
)
def test_prompts_with_completions_are_causal(columns, prompt, context, completion):
    found = layout(columns.split(","))
    assert found.kind == "causal"
    assert (found.prompt, found.context, found.completion) == (prompt, context, completion)


def test_plain_text_and_conversations_are_causal():
    assert layout(["text"]).text == layout(["text", "url"]).text == ("text",)
    assert layout(["paragraphs"]).text == ("paragraphs",)
    assert layout(["text", "label"], kind="causal").text == ("text",)
    assert layout(["id", "conversations"]).chat == "conversations"
    assert layout(["prompt", "messages"]).chat == "messages"


def test_named_columns_win_and_their_case_does_not_matter():
    found = layout(["Body", "Kind", "label"], text="body", label="kind")
    assert (found.text, found.label) == (("Body",), "Kind")
    assert layout(["review", "sentiment"], text="review").label == "sentiment"
    assert layout(["a", "b"], label="b").text == ("a",)
    assert layout(["a", "response"], prompt="a").completion == "response"
    assert layout(["q", "Answer"], prompt="query|q", completion="response|answer").completion == "Answer"


@pytest.mark.messages
@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            "a,b",
            {},
            r"\(from the first line, which must be a header\) are a, b; give --text-column NAME and --label-column",
        ),
        (f"{'I loved it ' * 20},positive", {}, r"header\) are 'I loved it .{20,80}\.\.\.', positive; give"),
        (f"{'I loved it ' * 20},positive", {"text": "review"}, r"must be one of I loved .{20,80}\.\.\., pos"),
        ("I loved it,positive", {}, "are 'I loved it', positive; give"),
        ("title,body,label", {}, "the text, .* pass --text-column title or --text-column body"),
        ("review,sentiment,rating", {}, "pass --label-column sentiment or --label-column rating"),
        ("question,response,output", {}, "--completion-column response or --completion-column output"),
        ("a,b,label", {}, "recognised as the text.* a, b, label; give --text-column NAME$"),
        ("a,b,c", {"text": "a", "kind": "classification"}, "the label .*; give --label-column NAME$"),
        ("a,b", {"prompt": "a"}, "recognised as the completion"),
        ("prompt", {}, r"are prompt; give --text-column NAME"),
        ("review,sentiment", {"text": "reviews"}, "text_column .*did you mean review"),
        ("text,label", {"text": "text", "label": "text"}, "must differ; both are 'text'"),
        ("a,b", {"text": "a,c"}, "text_column must be one of a, b; got 'c'"),
    ],
)
def test_columns_that_are_not_recognised_ask_for_flags(columns, given, message):
    with pytest.raises(InputError, match=f"^f\\.csv: .*{message}") as caught:
        layout(columns.split(","), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_a_column_like_an_unknown_label_is_asked_for(tmp_path):
    path = write_csv(tmp_path / "f.csv", ["text", "verdict"], reviews(20))
    with pytest.raises(InputError, match=r"is verdict the label of text\? give --label-column verdict"):
        load_task(path)
    assert load_task(path, label_column="verdict").labels == ("bad", "good")
    assert load_task(path, kind="causal").train[0]["completion"].startswith("film")
    scored = write_csv(tmp_path / "g.csv", ["text", "score"], [[f"film {i}", str(i / 7)] for i in range(60)])
    with pytest.raises(InputError, match=r"is score the label of text\?"):
        load_task(scored)
    with pytest.raises(InputError, match="regression is not supported"):
        load_task(scored, label_column="score")

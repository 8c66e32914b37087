"""Pictures of folders, Parquet files and data sets: what is read when, which pixels a model gets, what messages say."""

import io
import pickle
from functools import partial

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTConfig

from tangora._checks import InputError
from tangora.training.data import collator, encode, load_task
from tangora.training.data.examples import to_examples
from tangora.training.data.images import StoredImage, hub_image
from tangora.training.data.recognise import Columns, recognise
from tangora.training.data.sources import from_datasets
from tangora.training.data.task import Task
from tangora.training.metrics import predictions
from tangora.training.models import ImageScaler
from tangora.training.models.image_scaler import load_scaler
from tests.models import tiny_tokenizer, transformer
from tests.training.tiny import picture, write_pictures

SIZES = {"num_validation": 6, "num_test": 6}
SCALER = ImageScaler(
    (0.5,) * 3, (0.5,) * 3, 8, 8, CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
)


def png(number, colour=None):
    file = io.BytesIO()
    picture(number, number % 3 if colour is None else colour).save(file, "png")
    return file.getvalue()


def rows_of(folder):
    """The files of a folder in the order in which it is read, as bytes, with their labels."""
    files = sorted(folder.glob("*/*"))
    return [file.read_bytes() for file in files], [file.parent.name for file in files]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def task(folder):
    return load_task(folder, **SIZES)


def stored(content, where="here"):
    return StoredImage(where, partial(bytes, content))


def test_folder_of_labels(task, folder):
    assert task.kind == "classification"
    assert task.labels == ("GreenDog", "blue_sea", "red_cat")
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 6, 6)
    brightest = {"red_cat": 0, "GreenDog": 1, "blue_sea": 2}
    for example in (*task.train, *task.validation, *task.test):
        values = numpy.asarray(example["image"].decoded())
        assert values.shape == (10, 12, 3)
        assert values.mean((0, 1)).argmax() == brightest[task.labels[example["label"]]]
        assert str(folder) in example["image"].where
    assert any("image = 'image'" in note for note in task.notes)


def test_the_same_pictures_are_the_same_data_however_they_are_stored(task, folder, tmp_path):
    contents, labels = rows_of(folder)
    structs = [{"bytes": content, "path": None} for content in contents]
    files = [
        write_parquet(tmp_path / "a.parquet", image=structs, label=labels),
        write_parquet(tmp_path / "b.parquet", img=contents, label=labels),
    ]
    for file in files:
        assert load_task(file, **SIZES).fingerprint == task.fingerprint
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": structs, "label": labels}, features)
    read = from_datasets({"train": data}, "owner/pictures")
    assert read.splits["train"][3].values["image"].where == "owner/pictures/train: row 3: column 'image'"
    examples, names = to_examples(read, recognise(read, Columns(), None))
    assert names == task.labels
    found = sorted((e["image"].digest, e["label"]) for e in examples["train"])
    own = (*task.train, *task.validation, *task.test)
    assert found == sorted((e["image"].digest, e["label"]) for e in own)


def test_a_task_of_pictures_can_be_sent_to_another_process(task):
    sent = pickle.loads(pickle.dumps(task))
    assert sent.fingerprint == task.fingerprint
    found = [numpy.asarray(each.test[0]["image"].decoded()) for each in (task, sent)]
    assert numpy.array_equal(*found)


def test_fingerprint_sees_every_byte(task, folder):
    file = next(folder.glob("red_cat/*"))
    file.write_bytes(png(1000, 0))
    assert load_task(folder, **SIZES).fingerprint != task.fingerprint


def test_names_of_classes_come_from_the_data_set(folder):
    contents, labels = rows_of(folder)
    names = ["red_cat", "unseen", "blue_sea", "GreenDog"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    structs = [{"bytes": content, "path": None} for content in contents]
    data = datasets.Dataset.from_dict(
        {"image": structs, "label": [names.index(label) for label in labels]}, features
    )
    read = from_datasets({"train": data, "test": data.select([0, 29])}, "pictures")
    examples, found = to_examples(read, recognise(read, Columns(), None))
    assert found == tuple(names)
    assert [names[example["label"]] for example in examples["test"]] == [labels[0], labels[29]]
    assert [each["image"].digest for each in examples["test"]] == [
        stored(contents[0]).digest,
        stored(contents[29]).digest,
    ]


def test_hub_pictures_may_lie_in_files(folder):
    file = next(folder.glob("red_cat/*"))
    data = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)}]})
    assert hub_image(data, "image", 0, "row 0").digest == stored(file.read_bytes()).digest


def test_a_picture_that_is_repeated_counts_once(folder):
    (folder / "red_cat" / "copy.png").write_bytes((folder / "red_cat" / "0.png").read_bytes())
    task = load_task(folder, **SIZES)
    assert len(task.train) + len(task.validation) + len(task.test) == 30
    first = next(example["image"] for example in task.train)
    with pytest.raises(InputError, match="splits must not overlap"):
        Task("a", "classification", ({"image": first, "label": 0},), ({"image": first, "label": 1},), ())


def test_pictures_are_decoded_when_they_are_asked_for():
    reads = []

    def read(number):
        reads.append(number)
        return png(number)

    examples = [
        {"image": StoredImage(str(number), partial(read, number)), "label": number % 2} for number in range(5)
    ]
    data = encode(examples, SCALER, kind="classification", max_length=2)
    assert len(data) == 5
    assert not reads
    assert data[3]["labels"] == 1
    assert reads == [3]
    batch = collator(SCALER, "classification")(data[1:3])
    assert sorted(reads) == [1, 2, 3]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [1, 0]
    assert torch.equal(batch["pixel_values"][1], data[2]["pixel_values"])
    loader = DataLoader(data, batch_size=2, collate_fn=collator(SCALER, "classification"))
    loaded = list(loader)
    assert [len(each["labels"]) for each in loaded] == [2, 2, 1]
    assert torch.equal(
        torch.cat([each["pixel_values"] for each in loaded]), torch.stack([e["pixel_values"] for e in data])
    )


def test_an_evaluation_decodes_each_picture_once():
    reads = []

    def read(number):
        reads.append(number)
        return png(number)

    examples = [{"image": StoredImage("", partial(read, number)), "label": 0} for number in range(5)]
    data = encode(examples, SCALER, kind="classification", max_length=2)
    model = transformer("vit", seed=0, num_channels=3)
    found = predictions(model, data, collator(SCALER, "classification"), kind="classification", batch_size=2)
    assert sorted(reads) == list(range(5))
    expected = [model(example["pixel_values"][None]).logits.argmax().item() for example in data]
    assert found["predicted"].tolist() == expected


def test_pixels_are_those_of_the_models_image_processor():
    image = picture(0, 1)
    expected = SCALER.processor(image, return_tensors="pt")["pixel_values"][0]
    found = encode([{"image": stored(png(0, 1)), "label": 0}], SCALER, kind="classification", max_length=2)
    assert torch.equal(found[0]["pixel_values"], expected)
    # the middle 8 columns of 12 x 10 shrunk to 10 x 8, in which the second channel is bright
    assert expected.mean((1, 2)).argmax() == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_picture_has_the_models_channels(mode):
    source = picture(0, 0)
    image = Image.new("I;16", (12, 10), 700) if mode == "I;16" else source.convert(mode)
    assert SCALER.prepared(image).shape == (3, 8, 8)
    assert ImageScaler((0.5,), (0.5,), 8, 8).prepared(image).shape == (1, 8, 8)


def test_grey_models_get_scaled_grey():
    values = numpy.arange(64, dtype=numpy.uint8).reshape(8, 8)
    scaler = ImageScaler((0.5,), (0.25,), 8, 8)
    found = scaler.prepared(Image.fromarray(values))
    torch.testing.assert_close(found, (torch.from_numpy(values)[None] / 255 - 0.5) / 0.25)
    assert scaler.prepared(picture(0, 1)).shape == (1, 8, 8)


def test_colours_without_an_image_processor_are_resized():
    scaler = ImageScaler((0.0,) * 3, (1.0,) * 3, 5, 6)
    image = Image.new("RGB", (6, 5), (255, 51, 0))
    expected = torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 5, 6)
    torch.testing.assert_close(scaler.prepared(image), expected)
    assert scaler.prepared(picture(0, 1)).shape == (3, 5, 6)


def test_a_saved_scaler_prepares_as_before(tmp_path):
    config = ViTConfig(image_size=8, num_channels=3)
    SCALER.save_pretrained(tmp_path / "own")
    again = load_scaler(str(tmp_path / "own"), config, "own", local=True)
    assert torch.equal(again.prepared(picture(0, 1)), SCALER.prepared(picture(0, 1)))
    # arrays lie in [0, 1], and the file says that they are not rescaled: pictures are, all the same
    plain = ImageScaler((0.5,) * 3, (0.5,) * 3, 10, 12)
    plain.save_pretrained(tmp_path / "plain")
    again = load_scaler(str(tmp_path / "plain"), ViTConfig(image_size=[10, 12]), "plain", local=True)
    assert again.processor is not None
    torch.testing.assert_close(again.prepared(picture(0, 1)), plain.prepared(picture(0, 1)))


def test_pictures_are_turned_upright():
    file = io.BytesIO()
    source = picture(0, 0)
    exif = source.getexif()
    exif[0x0112] = 6  # held with the right side up
    source.save(file, "png", exif=exif)
    upright = stored(file.getvalue()).decoded()
    assert upright.size == (10, 12)
    assert numpy.array_equal(numpy.asarray(upright), numpy.rot90(numpy.asarray(source), -1))


# --- what cannot be read


@pytest.mark.messages
def test_a_file_that_is_no_picture_is_named(folder):
    bad = folder / "red_cat" / "bad.png"
    bad.write_text("no picture")
    with pytest.raises(InputError, match=rf"{bad} must be an image that can be read"):
        load_task(folder)


@pytest.mark.messages
def test_a_cut_off_picture_is_named_when_it_is_read(folder):
    bad = folder / "red_cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    task = load_task(folder, **SIZES)
    examples = [*task.train, *task.validation, *task.test]
    data = encode(examples, SCALER, kind="classification", max_length=2)
    with pytest.raises(InputError, match=rf"{bad} must be an image that can be read"):
        list(data)


@pytest.mark.messages
def test_a_deleted_picture_is_named(task):
    image = task.train[0]["image"]
    image.read.__self__.unlink()
    with pytest.raises(InputError, match=rf"{image.where} must be an image that can be read; No such file"):
        image.decoded()


@pytest.mark.messages
def test_a_row_without_its_picture_is_named(tmp_path):
    cells = [{"bytes": png(number), "path": ""} for number in range(6)]
    labels = list("ababab")
    file = write_parquet(tmp_path / "a.parquet", image=[*cells[:5], None], label=labels)
    with pytest.raises(InputError, match=r"a\.parquet: row 5: column 'image' must hold an image; got None"):
        load_task(file)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": [*cells[:5], None], "label": labels}, features)
    read = from_datasets({"train": data}, "pictures")
    with pytest.raises(
        InputError, match="row 5: column 'image' must be an image that can be read; it is missing"
    ):
        to_examples(read, recognise(read, Columns(), None))


@pytest.mark.messages
def test_texts_and_pictures_do_not_mix(folder):
    (folder / "red_cat" / "note.txt").write_text("a text")
    with pytest.raises(InputError, match=r"texts or images; it contains both, such as .*note\.txt and"):
        load_task(folder)


@pytest.mark.messages
def test_columns_of_pictures(tmp_path):
    pictures = [png(number) for number in range(6)]
    labels = list("ababab")
    file = write_parquet(tmp_path / "a.parquet", left=pictures, right=pictures[::-1], label=labels)
    with pytest.raises(InputError, match="several columns hold images, left, right; give --text-column left"):
        load_task(file)
    sizes = {"num_validation": 1, "num_test": 1}
    chosen = load_task(file, text_column="right", **sizes)
    assert {each["image"].digest for each in chosen.test} < {stored(png(n)).digest for n in range(6)}
    assert any("image = 'right'; not used: 'left'" in note for note in chosen.notes)
    with pytest.raises(InputError, match="images can only be classified"):
        load_task(file, text_column="left", kind="causal")
    captions = [f"caption {number}" for number in range(6)]
    both = write_parquet(tmp_path / "b.parquet", image=pictures, text=captions, label=labels)
    assert "image" in load_task(both, **sizes).train[0]
    assert "text" in load_task(both, text_column="text", **sizes).train[0]


@pytest.mark.messages
def test_pictures_need_a_model_that_reads_them(task):
    with pytest.raises(InputError, match="need an image model"):
        encode(task.train, tiny_tokenizer(), kind="classification", max_length=8)
    with pytest.raises(InputError, match="needs image data"):
        encode([{"text": "a", "label": 0}], SCALER, kind="classification", max_length=8)
    with pytest.raises(InputError, match="1 or 3 channels, and the model takes 4"):
        ImageScaler((0.0,) * 4, (1.0,) * 4, 8, 8).prepared(picture(0, 0))


@pytest.mark.messages
def test_pictures_of_another_size_are_named():
    small = ImageScaler((0.5,) * 3, (0.5,) * 3, 16, 16, SCALER.processor)
    data = encode(
        [{"image": stored(png(0), "p.png"), "label": 0}], small, kind="classification", max_length=2
    )
    with pytest.raises(InputError, match=r"p\.png must have the model's 3 x 16 x 16 pixels; got 3 x 8 x 8"):
        data[0]

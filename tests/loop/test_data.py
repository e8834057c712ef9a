"""Rows from JSONL, folders and `datasets`, through a Qwen3-VL processor built offline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from copd import train
from copd.config import Config
from copd.data import FileTask
from copd.lab.config import TinyConfig
from copd.lab.tasks import vocabulary
from copd.lab.tasks.synthetic import patches
from copd.lab.tiny import build_tiny
from copd.processor import FrameProcessor, PilProcessor, load_processor
from copd.schema import load
from copd.settings import DataConfig
from copd.tables import fingerprint

EXAMPLES = Path(__file__).parents[2] / "examples"


def rows(count, **columns):
    return [{"prompt": f"Number {i}?", "answer": str(i), **columns} for i in range(count)]


def config(path, **options):
    return DataConfig(**{"path": path, "test_rows": 1, **options})


@pytest.mark.parametrize(("name", "kind", "tokens"), [("text", 0, 0), ("image", 1, 64), ("video", 2, 128)])
def test_examples_become_prompts_of_their_modality(processor, name, kind, tokens):
    task = FileTask(name, DataConfig(path=str(EXAMPLES / f"{name}.jsonl"), test_rows=2), processor)
    prompt = task.prompt(0)
    assert len(prompt.mm_token_type_ids) == len(prompt.input_ids)
    assert prompt.mm_token_type_ids.count(kind) == (tokens or len(prompt.input_ids))
    assert prompt.text.startswith("<|im_start|>user\n")
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert list(prompt.columns) == ["answer"]


def test_pixels_are_what_the_model_expects(processor, write):
    task = FileTask("image", config(write(*rows(2, images=["a.png"]))), processor)
    prompt = task.prompt(0)
    assert prompt.media["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.equal(prompt.media["pixel_values"], torch.ones(24, 3 * 2 * 4 * 4))
    assert [image.shape for image in prompt.images] == [(16, 24, 3)]


def test_frames_are_paired_as_in_the_synthetic_video(processor):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    want = patches(frames / 127.5 - 1)
    reader = FrameProcessor(processor.image_processor, {"size": {"shortest_edge": 1, "longest_edge": 10**6}})
    got = reader([frames], video_metadata=[None])
    assert torch.equal(got["video_grid_thw"], want["video_grid_thw"])
    torch.testing.assert_close(got["pixel_values_videos"], want["pixel_values_videos"], atol=1e-6, rtol=0)


def test_an_odd_last_frame_is_repeated(processor):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    reader = FrameProcessor(processor.image_processor, {"size": {"shortest_edge": 1, "longest_edge": 10**6}})
    odd, even = reader([frames], [None]), reader([frames[[0, 1, 2, 2]]], [None])
    assert torch.equal(odd["pixel_values_videos"], even["pixel_values_videos"])


def test_frames_that_need_resizing_name_the_package_and_their_row(processor, write, tmp_path, monkeypatch):
    frames = np.zeros((2, 17, 16, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match=r"multiples of 8.* got 2 frames of 17 x 16; pip install torchvision"):
        processor.video_processor([frames], [None])
    monkeypatch.setitem(processor.video_processor.settings, "size", {"shortest_edge": 1, "longest_edge": 256})
    task = FileTask("video", config(write(*rows(2, videos=["clip"]))), processor)
    with pytest.raises(ValueError, match=r"video: row 0 of .*: the model's processor must read it; got .* torchvision"):
        task.prompt(0)


def test_frames_come_in_the_order_of_their_numbers_evenly_spaced_and_dated(processor, write):
    cfg = config(write(*rows(2, video="clip")), max_frames=3, fps=5.0)
    prompt = FileTask("video", cfg, processor).prompt(0)
    assert [int(image[0, 0, 0]) for image in prompt.images] == [0, 5, 10]
    read = processor.tokenizer.decode(prompt.input_ids)
    assert "<0.5 seconds>" in read  # between frames 0 and 5
    assert "<2.0 seconds>" in read  # frame 10, repeated


def test_a_list_of_frames_is_a_video_too(processor, write):
    frames = [f"clip/frame_{i}.png" for i in (3, 2)]
    prompt = FileTask("video", config(write(*rows(2, video=frames))), processor).prompt(0)
    assert [int(image[0, 0, 0]) for image in prompt.images] == [3, 2]


def test_messages_keep_their_roles_and_place_media_where_they_say(processor, write):
    content = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    task = FileTask("image", config(write(*[{"prompt": chat, "image": "a.png", "answer": i} for i in "ab"])), processor)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"Be brief.<|im_end|>\n<|im_start|>user\nLook:{placeholder}<|im_end|>" in task.prompt(0).text


def test_a_system_prompt_is_added_once(processor, write):
    chat = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    path = write({"prompt": "Hi"}, {"prompt": chat}, {"prompt": "Bye"})
    task = FileTask("text", config(path, system_prompt="General."), processor)
    assert [task.prompt(i).text.count("system") for i in (0, 1)] == [1, 1]
    assert ["General." in task.prompt(i).text for i in (0, 1)] == [True, False]


def test_text_is_taken_as_it_is_without_chat(processor, write):
    prompt = FileTask("text", config(write(*rows(2)), chat=False), processor).prompt(0)
    assert prompt.text == "Number 0?"
    assert processor.tokenizer.decode(prompt.input_ids) == "Number 0?"


def test_the_last_rows_are_held_out_and_equal_rows_leave_the_training_split(processor, write):
    task = FileTask("text", config(write(*rows(6), rows(6)[1]), test_rows=2), processor)
    answers = {split: [task.prompt(i, split).columns["answer"] for i in range(task.size(split))] for split in task.rows}
    assert answers == {"train": ["0", "2", "3", "4"], "test": ["5", "1"]}


def test_a_test_file_is_used_whole(processor, write, tmp_path):
    shutil.copy(write(*rows(2)), tmp_path / "test.jsonl")
    task = FileTask("text", config(write(*rows(5)[2:]), test_path=str(tmp_path / "test.jsonl")), processor)
    assert (task.size("train"), task.size("test")) == (3, 2)


def test_rewards_see_columns_and_the_form_of_the_file(processor, write, monkeypatch):
    seen = []

    def spy(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1.0] * len(completions)

    chat = [{"role": "user", "content": "Hi"}]
    path = write({"prompt": "Hi", "answer": "a", "level": 3}, {"prompt": chat, "answer": "b"}, {"prompt": "Bye"})
    task = FileTask("text", config(path, reward_weights=[0.5]), processor)
    monkeypatch.setattr(task, "functions", [spy])
    assert task.reward([task.prompt(0), task.prompt(1), task.prompt(0, "test")], ["x", "y", "z"]) == [0.5] * 3
    assistant = [{"role": "assistant", "content": "y"}]
    columns = {"answer": ["a", "b", "0"], "level": [3, None, None]}
    assert seen == [(["Hi", chat, "Bye"], ["x", assistant, "z"], columns)]


def test_decode_leaves_special_tokens_out(processor, write):
    task = FileTask("text", config(write(*rows(2))), processor)
    assert task.decode(processor.tokenizer.encode("four<|im_end|>")) == "four"


def test_datasets_and_their_decoded_images_work(processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (16, 16), "white")
    made = datasets.Dataset.from_list([{"prompt": f"{i}?", "images": [image], "answer": str(i)} for i in range(3)])
    made.cast_column("images", datasets.List(datasets.Image())).save_to_disk(tmp_path / "saved")
    task = FileTask("image", config(str(tmp_path / "saved")), processor)
    assert [task.size("train"), task.size("test")] == [2, 1]
    assert task.prompt(0, "test").columns == {"answer": "2"}
    assert task.prompt(1).media["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_equal_rows_of_a_dataset_leave_the_training_split_and_other_images_stay(processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    white, black = (Image.new("RGB", (16, 16), colour) for colour in ("white", "black"))
    made = datasets.Dataset.from_list([{"prompt": "?", "images": [im], "answer": "1"} for im in (white, black, white)])
    made.cast_column("images", datasets.List(datasets.Image())).save_to_disk(tmp_path / "saved")
    task = FileTask("image", config(str(tmp_path / "saved")), processor)
    assert [task.size("train"), task.size("test")] == [1, 1]
    assert task.prompt(0).images[0].max() == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "images": ["b.png"]}, r"words: row 1 of .*rows.jsonl: image must be a path, a URL.*b.png"),
        ({"prompt": "Hi", "video": "gone"}, r"row 1 of .*rows.jsonl: video must be a file, a folder of frames.*gone"),
        ({"prompt": "Hi", "images": [3]}, "image must be a path, a URL, bytes or a picture; got int"),
        ({"answer": "4"}, "row 1 of .*: prompt must be text or a list of messages; got None"),
    ],
)
def test_a_broken_row_is_found_before_training(processor, write, row, message):
    with pytest.raises(ValueError, match=message):
        FileTask("words", config(write({"prompt": "Hi"}, row, {"prompt": "Bye"})), processor)


def test_media_must_be_placed_as_often_as_there_are(processor, write):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(ValueError, match=r"row 0 of .*messages must place each image once, 1 in all; got 2"):
        FileTask("image", config(write({"prompt": chat, "images": ["a.png"]}, {"prompt": "Bye"})), processor)


def test_a_text_model_refuses_images(processor, write):
    with pytest.raises(ValueError, match=r"row 0 of .*the model must read images; got a tokenizer alone"):
        FileTask("image", config(write(*rows(2, images=["a.png"])), chat=False), processor.tokenizer)


def test_an_overlong_prompt_is_an_error_or_the_next_row(processor, write):
    path = write({"prompt": "long " * 50}, {"prompt": "Hi"}, {"prompt": "Bye"})
    with pytest.raises(ValueError, match=r"row 0 of .*: prompt must have at most 40 tokens; got \d+; raise max"):
        FileTask("text", config(path, max_prompt_tokens=40), processor).prompt(0)
    task = FileTask("text", config(path, max_prompt_tokens=40, overlong="next"), processor)
    assert task.prompt(0) == task.prompt(1)
    with pytest.raises(ValueError, match="one train prompt must have at most 2 tokens; got none"):
        FileTask("text", config(path, max_prompt_tokens=2, overlong="next"), processor).prompt(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}\n{", "line 2 of .* must be JSON"), ("[1]\n", "line 1 of .* must be an object; got a list")],
)
def test_a_malformed_file_names_the_line(processor, tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        FileTask("text", config(str(tmp_path / "rows.jsonl")), processor)


def test_a_missing_file_and_an_empty_split_are_refused(processor, write):
    with pytest.raises(ValueError, match=r"path must be a JSONL file.* got 'no.jsonl', which does not exist"):
        FileTask("text", config("no.jsonl"), processor)
    with pytest.raises(ValueError, match=r"text: data must leave rows to train on .* got 2 rows of .* and test_rows 2"):
        FileTask("text", config(write(*rows(2)), test_rows=2), processor)


def checkpoint(folder, processor, **sizes):
    model = build_tiny(TinyConfig(**{"hidden_size": 32, "layers": 1, "vision_layers": 1} | sizes), seed=0)
    model.resize_token_embeddings(len(processor.tokenizer))
    ids = processor.tokenizer.convert_tokens_to_ids(vocabulary.MEDIA)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for name, value in zip(names, ids, strict=True):
        setattr(model.config, name, value)
    model.config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_a_saved_processor_reads_the_same_rows(processor, tmp_path):
    checkpoint(tmp_path, processor)
    cfg = DataConfig(path=str(EXAMPLES / "video.jsonl"), test_rows=2)
    want, got = (FileTask("video", cfg, p).prompt(0) for p in (processor, PilProcessor.from_pretrained(tmp_path)))
    assert want.input_ids == got.input_ids
    assert FileTask("video", cfg, load_processor(tmp_path)).prompt(0).input_ids == want.input_ids
    assert torch.equal(want.media["pixel_values_videos"], got.media["pixel_values_videos"])
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor"
    assert saved["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"


def test_a_checkpoint_without_image_processor_gives_its_tokenizer(processor, tmp_path):
    build_tiny(TinyConfig(hidden_size=32, layers=1, vision_layers=1), seed=0).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_processor(tmp_path), type(AutoTokenizer.from_pretrained(tmp_path)))


def test_the_examples_train_from_a_saved_checkpoint(processor, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    checkpoint(tmp_path / "base", processor)
    options = [
        f"model.path={tmp_path / 'base'}",
        f"output_dir={tmp_path / 'runs'}",
        "model.dtype=float32",
        "threads=1",
        "cycles=1",
        "rl_steps=1",
        "opd_steps=1",
        "rollout={prompts: 2, samples: 2, max_new_tokens: 6}",
        "eval={every: 0, prompts: 2, samples: 1, curve_prompts: 2, divergence_prompts: 1, shown: 1}",
    ]
    cfg: Config = load(Config, EXAMPLES / "shapes.yaml", options)
    train.run(cfg)
    results = json.loads((cfg.run_dir / "results.json").read_text())
    assert set(results["final"]) == {"base", "text", "image", "video", "merged"}
    assert (cfg.run_dir / "merged" / "processor_config.json").is_file()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "answer": None}, "row must have the columns .*; got no answer for exact_match"),
        ({"prompt": "Hi", "completions": 1}, "columns must not be called prompts or completions.*; got 'completions'"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            r"messages must hold a user turn; got roles \['assistant'",
        ),
        (
            {"prompt": [{"role": "user"}]},
            "messages must have a role, and content as text or parts; got {'role': 'user'}",
        ),
        ({"prompt": ["Hi"]}, "messages must have a role, and content as text or parts; got 'Hi'"),
    ],
)
def test_a_row_no_reward_or_template_could_read_is_found_at_the_start(processor, write, row, message):
    with pytest.raises(ValueError, match=f"words: row 1 of .*rows.jsonl: {message}"):
        FileTask("words", config(write({"prompt": "Hi"}, row, {"prompt": "Bye"})), processor)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_only_newlines_end_a_line(processor, tmp_path, separator):
    first, text = (json.dumps({"prompt": f"{i}{separator}b", "answer": "1"}, ensure_ascii=False) for i in range(2))
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{first}\r\n{text}\n", encoding="utf-8")
    task = FileTask("text", config(str(tmp_path / "rows.jsonl"), chat=False, test_rows=1), processor)
    assert task.prompt(0, "test").text == json.loads(text)["prompt"]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_table_is_read_by_its_ending(processor, tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    getattr(datasets.Dataset.from_list(rows(3)), f"to_{kind}")(tmp_path / f"rows.{kind}")
    task = FileTask("text", config(str(tmp_path / f"rows.{kind}")), processor)
    assert [task.size("train"), task.size("test")] == [2, 1]
    assert str(task.prompt(0, "test").columns["answer"]) == "2"


def test_template_arguments_reach_the_template(processor, write, monkeypatch):
    template = processor.chat_template + "{% if not thinks %}<think></think>{% endif %}"
    monkeypatch.setattr(processor, "chat_template", template)
    path = write(*rows(2))
    texts = [FileTask("t", config(path, chat_template_kwargs=k), processor).prompt(0).text for k in ({"thinks": 1}, {})]
    assert [text.endswith("<think></think>") for text in texts] == [False, True]


def test_a_prompt_that_ends_in_an_assistants_words_is_continued(processor, write):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is"}]
    prompt = FileTask("text", config(write({"prompt": chat}, {"prompt": "Bye"})), processor).prompt(0)
    assert prompt.text.endswith("<|im_start|>assistant\nThe answer is")


def test_a_completion_without_reward_is_left_out_and_named_up_to_a_share(processor, write, caplog):
    task = FileTask("text", config(write(*rows(3)), max_failed_rewards=0.5), processor)
    task.functions = [lambda prompts, completions, answer, **_: [1 / float(text) for text in completions]]
    prompts = [task.prompt(0), task.prompt(1)]
    values = task.reward(prompts, ["2", "x"])
    assert values[0] == 0.5
    assert np.isnan(values[1])
    assert "text: row 1 of" in caplog.text
    assert "ValueError: could not convert" in caplog.text
    assert task.reward_stats == {"rewards/failed_ratio": 0.5, "rewards/<lambda>/mean": 0.5, "rewards/<lambda>/std": 0.0}
    with pytest.raises(ValueError, match=r"row 0 of .*: at most 50% of a batch may fail its reward; got 2 of 2; .*'y'"):
        task.reward(prompts, ["y", "x"])


def test_a_changed_file_or_reward_has_another_fingerprint(write, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def score(prompts, completions, **_):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config(write(*rows(3)), rewards=["my_reward:score"])
    first = fingerprint(cfg)
    assert fingerprint(cfg) == first
    assert set(first) == {cfg.path, "my_reward:score"}
    write(*rows(4))
    assert fingerprint(cfg)[cfg.path] != first[cfg.path]

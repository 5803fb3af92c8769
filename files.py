"""What all readers of a file share: it may say anything, and what is wrong with it is one line.

`in_file` is around what reads, `read_json` and `read_text` give a file's content. `whole` is around
what writes: nothing of ours is ever found half written.
"""
import contextlib
import functools
import json
import os
import re

LONGEST = 1200  # characters of a message
FORMS = (AttributeError, TypeError, LookupError, ArithmeticError, RecursionError,
         re.error)  # what Python says of a part that is missing or of another form


def printable(text):
    """A text on one line, whatever it quotes, and no longer than a reader reads.

    >>> printable("a\\nb\\ud83d"), len(printable("a" * 9999))
    ('a\\\\nb\\\\ud83d', 1203)
    """
    text = re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
                  lambda found: ascii(found[0])[1:-1], text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


@contextlib.contextmanager
def in_file(path):
    """Within the body, whatever a file's content leads to is a ValueError, or an OSError, of one
    line that names it, or a file of that folder."""
    try:
        yield
    except OSError as error:
        if len(error.args) != 1 or printable(str(error)) == str(error):
            raise
        raise type(error)(printable(str(error))) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None
    except ValueError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(printable(f"{where}{error}")) from None
    except FORMS as error:
        what = f"a part is missing or of another form ({type(error).__name__}: {error})"
        raise ValueError(printable(f"{path}: {what}")) from error


def one_line(read):
    """A function whose first argument is the path of what it reads, within `in_file`."""
    @functools.wraps(read)
    def within(path, *args, **kwargs):
        with in_file(path):
            return read(path, *args, **kwargs)
    return within


def require(ok, message):
    """ValueError with this message, unless ok."""
    if not ok:
        raise ValueError(message)


def check_file(path):
    """ValueError for a pointer that git-lfs leaves in place of a file."""
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs.github.com/")
    require(not pointer, f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` "
                         f"in {path.parent}")


def existing(path):
    """The path itself. FileNotFoundError, in one line, if it is no file."""
    if not path.is_file():
        others = sorted(path.parent.glob("*.gguf"))
        hint = f"pass {others[0]} itself" if others else "is it a Hugging Face model folder?"
        raise FileNotFoundError(f"no {path.name} in {path.parent}: {hint}")
    check_file(path)
    return path


@one_line
def read_text(path):
    """A file's text, in UTF-8."""
    return path.read_text(encoding="utf-8")


@one_line
def read_json(path):
    """The object that is a JSON file's content; ValueError for anything else, and for a text in it
    that is none: half a surrogate pair could not be written again."""
    text = read_text(path)
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: half a surrogate pair in it is not text") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that is read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def whole(path):
    """Within the body, where to write a file that takes its place, path, afterwards: so it is there
    whole, or what was there before is, though the power fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

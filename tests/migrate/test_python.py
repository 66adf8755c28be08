"""Code: what is renamed, what is left alone, and that nothing else changes."""

from __future__ import annotations

from pathlib import PurePath
from textwrap import dedent

import pytest

from embferry.migrate.python import ParseError, rewrite

IMPORT = "from sglang.srt.disaggregation.multimodal_language import MultimodalLanguageRequest\n"


def migrated(code: str, path: str = "mine.py", own: frozenset[str] = frozenset(), assume: bool = False) -> str:
    """The new text, of code that comes out the same when it is migrated again."""
    first = rewrite(dedent(code).encode(), PurePath(path), own, assume)
    assert rewrite(first.data, PurePath(path), own, assume).data == first.data
    return first.data.decode()


def notes(code: str) -> list[str]:
    return [sentence for _, sentence in rewrite(dedent(code).encode(), PurePath("mine.py")).notes]


def test_the_whole_of_it() -> None:
    before = '''\
        """Drives requests; the continuation transfer is below."""
        from sglang.srt.disaggregation.multimodal_language import MultimodalLanguageRequest

        def step(language_req: MultimodalLanguageRequest, receiver,new_allocation):
            # needs_continuation is set when partial_data is not all
            if language_req.needs_continuation :
                received_tokens = language_req.received_tokens   # so far
                receiver.init_continuation(allocation = new_allocation, sent_tokens=received_tokens)
                logger.info(f"Sent continuation request: {received_tokens=} {language_req.partial_data['x']}")
            return MultimodalLanguageRequest(
                req, receiver, partial_data={}, received_tokens=0, needs_continuation=False)
    '''
    after = '''\
        """Drives requests; the resumed transfer is below."""
        from sglang.srt.disaggregation.multimodal_language import MultimodalLanguageRequest

        def step(language_req: MultimodalLanguageRequest, receiver,new_allocation):
            # needs_resume is set when buffered_chunks is not all
            if language_req.needs_resume :
                transferred_tokens = language_req.transferred_tokens   # so far
                receiver.resume_transfer(allocation = new_allocation, sent_tokens=transferred_tokens)
                logger.info(f"Sent resume transfer request: {transferred_tokens=} {language_req.buffered_chunks['x']}")
            return MultimodalLanguageRequest(
                req, receiver, buffered_chunks={}, transferred_tokens=0, needs_resume=False)
    '''
    assert migrated(before) == dedent(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class Mine(Base):\n    needs_continuation: bool = False\n    received_tokens: int = 0\n",
         "class Mine(Base):\n    needs_resume: bool = False\n    transferred_tokens: int = 0\n"),
        ("class R:\n    def init_continuation(self, allocation): ...\n",
         "class R:\n    def resume_transfer(self, allocation): ...\n"),
        ("r.init_continuation(a, received_tokens=3)\n", "r.resume_transfer(a, sent_tokens=3)\n"),
        ("x = getattr(r, 'partial_data', None)\n", "x = getattr(r, 'buffered_chunks', None)\n"),
        ("setattr(r, \"received_tokens\", 5)\n", "setattr(r, \"transferred_tokens\", 5)\n"),
        ("patch.object(R, 'init_continuation')\n", "patch.object(R, 'resume_transfer')\n"),
        ("patch('a.conn_multimodal.MooncakeEmbeddingReceiver.init_continuation')\n",
         "patch('a.conn_multimodal.MooncakeEmbeddingReceiver.resume_transfer')\n"),
        ("vars(r)['partial_data']\n", "vars(r)['buffered_chunks']\n"),
        ("r.__dict__['received_tokens']\n", "r.__dict__['transferred_tokens']\n"),
        ("MultimodalLanguageRequest(**{'partial_data': x})\n", "MultimodalLanguageRequest(**{'buffered_chunks': x})\n"),
        ("__slots__ = ('partial_data', 'needs_continuation')\n", "__slots__ = ('buffered_chunks', 'needs_resume')\n"),
        ("replace(r, partial_data=None)\n", "replace(r, buffered_chunks=None)\n"),
        ("SimpleNamespace(needs_continuation=True)\n", "SimpleNamespace(needs_resume=True)\n"),
        ("match r:\n    case MultimodalLanguageRequest(needs_continuation=True): pass\n",
         "match r:\n    case MultimodalLanguageRequest(needs_resume=True): pass\n"),
        ("partial_data = torch.cat(r.partial_data)\n", "buffered_chunks = torch.cat(r.buffered_chunks)\n"),
        ("if 'continuation' in line: pass\n", "if 'resume' in line: pass\n"),
        ("re.search('continuation', line)\n", "re.search('resume', line)\n"),
        ("re.compile(r'Sent continuation\\s+request')\n", "re.compile(r'Sent resume\\s+transfer\\s+request')\n"),
        ("log.warning('room %d: needs continuation', n)\n", "log.warning('room %d: needs resume', n)\n"),
        ("raise ValueError('partial_data is %s' % x)\n", "raise ValueError('buffered_chunks is %s' % x)\n"),
        ("def f():\n    is_continuation = g()\n    return is_continuation\n",
         "def f():\n    is_resume = g()\n    return is_resume\n"),
        ("self._pending_continuation_requests = []\n", "self._pending_resume_requests = []\n"),
        ("global _continuation_queue\n_continuation_queue = 1\n", "global _resume_queue\n_resume_queue = 1\n"),
        ("asdict(r)['received_tokens'] ; del r.x\n", "asdict(r)['transferred_tokens'] ; del r.x\n"),
    ],
)  # fmt: skip
def test_what_is_the_systems_is_renamed(before: str, after: str) -> None:
    assert migrated("import torch\n" + IMPORT + before) == "import torch\n" + IMPORT + after


@pytest.mark.parametrize(
    "code",
    [
        "import beluga\nsteps = beluga.init_continuation()\n",
        "import httpx\nr = httpx.get(u)\nr.partial_data\n",
        "import httpx\ndef f(r: httpx.Response): return r.partial_data\n",
        "import httpx\nwith httpx.stream(u) as r:\n    r.received_tokens\n",
        "import vendor\nvendor.upload(partial_data=1)\n",
        "import httpx\nr = httpx.get(u)\ngetattr(r, 'partial_data')  # partial_data of httpx\n",
        "from vendor import needs_continuation\nneeds_continuation(line)\n",
        "row = {'received_tokens': 3, 'partial_data': 4}\n",
        "row['received_tokens']\n",
        "metrics = dict(received_tokens=3)\n",
        "'{received_tokens}'.format(received_tokens=3)\n",
        "log.info('%(received_tokens)d', row)\n",
        "sql('SELECT received_tokens FROM t')\n",
        "# a line continuation\nx = 'HTTP continuation request'  # UTF-8 continuation byte\n",
        "header = 'HTTP/1.1 100 Continue'  # an HTTP continuation transfer\n",
        "line_continuation = continuation_byte = 5\n",
        "def f(line):\n    continuation = line.endswith('\\\\')\n    return continuation\n",
        "kind = 'continuation'\n",
        "def handle_continuation(room): ...\n",
        "def f(continuation_offset=0): ...\n",
        "self.my_partial_data = other.partial_data_of\n",
    ],
)
def test_what_means_something_else_is_left_alone(code: str) -> None:
    assert migrated(IMPORT + code) == IMPORT + code


@pytest.mark.parametrize(
    "code",
    [
        "import httpx\nresponse.partial_data\n",
        "import sglang\nclass P:\n    needs_continuation = False\n",
        "from .protocol import messages\nx.received_tokens\n",
        "from .embferry import x\nx.received_tokens\n",
        "# MultimodalLanguageRequest\nx.received_tokens\n",
        "'a text about MultimodalLanguageRequest'\nx.received_tokens\n",
    ],
)
def test_a_file_without_the_system_is_left_alone_and_named(code: str) -> None:
    outcome = rewrite(code.encode(), PurePath("other.py"))
    assert outcome.data == code.encode()
    assert [line for line, sentence in outcome.notes if "nothing in this file uses the system" in sentence] == [0]


@pytest.mark.parametrize(
    "line",
    [
        "import embferry",
        "from embferry.disaggregation import utils",
        "import sglang.srt.disaggregation.utils",
        "from sglang.srt.disaggregation.mooncake import conn_multimodal",
        "from ..mooncake.conn_multimodal import X",
        "class Mine(MooncakeEmbeddingReceiver): ...",
        "p = 'sglang.srt.disaggregation.multimodal_language.X'",
    ],
)
def test_what_tells_that_a_file_has_to_do_with_the_system(line: str) -> None:
    assert migrated(f"{line}\nx.needs_continuation\n") == f"{line}\nx.needs_resume\n"


@pytest.mark.parametrize("path", ["fork/disaggregation/utils.py", "a/multimodal_language.py"])
def test_the_systems_own_files_are_known_by_their_place(path: str) -> None:
    assert migrated("x.needs_continuation\n", path) == "x.needs_resume\n"


def test_assume_takes_any_file() -> None:
    assert migrated("x.received_tokens\n", assume=True) == "x.transferred_tokens\n"


def test_the_users_own_modules_are_no_other_library() -> None:
    code = IMPORT + "from serving import build\nr = build()\nr.partial_data\n"
    assert migrated(code) == code
    assert "r.buffered_chunks" in migrated(code, own=frozenset({"serving"}))


def test_one_name_is_never_made_of_two() -> None:
    code = IMPORT + "def f(r):\n    needs_resume = 1\n    needs_continuation = r.needs_continuation\n"
    assert migrated(code) == code
    assert notes(code) == ["needs_continuation is left alone in this file: needs_resume is bound beside it already"]
    both = IMPORT + "class R:\n    def resume_transfer(self): ...\n    init_continuation = resume_transfer\n"
    assert migrated(both) == both


def test_what_is_left_is_said_with_its_line() -> None:
    code = IMPORT + "import httpx\nhttpx.get(u).partial_data\nx = {'received_tokens': 1}\ndef is_continuation(): ...\n"
    assert [line for line, _ in rewrite(code.encode(), PurePath("mine.py")).notes] == [3, 4, 5]
    assert notes(code) == [
        "partial_data is another library's here; left alone",
        "received_tokens is a key or a placeholder of your own here; left alone",
        "is_continuation may be used from other files; rename it yourself if it belongs to the system",
    ]


@pytest.mark.parametrize(
    "data",
    [
        IMPORT.encode().replace(b"\n", b"\r\n") + b"\r\n\x0c\r\nx.needs_continuation\r\n",
        b"\xef\xbb\xbf" + IMPORT.encode() + b"x.needs_continuation # caf\xc3\xa9",
        b"# -*- coding: latin-1 -*-\n" + IMPORT.encode() + b"x.needs_continuation # caf\xe9\n",
        IMPORT.encode() + b"if 1:\n\tx . needs_continuation\\\n\t\t= ( 1 ,)  ;\n\n\n",
    ],
)
def test_every_other_byte_stays(data: bytes) -> None:
    new = rewrite(data, PurePath("mine.py")).data
    assert new == data.replace(b"needs_continuation", b"needs_resume")


@pytest.mark.parametrize(
    "data",
    [
        b"print 'needs_continuation'\n",
        b"x.needs_continuation # \xff\n",
        b"# coding: nowhere\nx.partial_data\n",
        b"\x0cx.partial_data\n",
    ],
)
def test_what_cannot_be_read_is_said_and_does_not_crash(data: bytes) -> None:
    with pytest.raises(ParseError, match="not read: "):
        rewrite(data, PurePath("mine.py"))

"""Python code: the names that are renamed, those that are left alone and listed, and that nothing else changes."""

from __future__ import annotations

from pathlib import PurePath
from textwrap import dedent

import pytest

from embferry.migrate.python import rewrite
from embferry.migrate.words import RewriteError

IMPORT = "from sglang.srt.disaggregation.multimodal_language import MultimodalLanguageRequest\n"


def migrated(code: str, path: str = "mine.py", own: frozenset[str] = frozenset(), assume: bool = False) -> str:
    """Returns the new code, after checking that migrating it once more changes nothing."""
    first, _ = rewrite(dedent(code).encode(), PurePath(path), own, assume)
    assert rewrite(first, PurePath(path), own, assume)[0] == first
    return first.decode()


def doubtful_lines(code: str) -> list[int]:
    return sorted({line for line, _ in rewrite(dedent(code).encode(), PurePath("mine.py"))[1]})


def test_a_request_loop_is_migrated_and_keeps_its_formatting() -> None:
    before = '''\
        """Drives requests; the continuation transfer is below."""
        from sglang.srt.disaggregation.multimodal_language import MultimodalLanguageRequest

        def step(language_req: MultimodalLanguageRequest, receiver,new_allocation):
            # needs_continuation is set when partial_data is not all
            if language_req.needs_continuation :
                received_tokens = language_req.received_tokens   # so far
                receiver.init_continuation(allocation = new_allocation, sent_tokens=received_tokens)
                logger.info(f"Sent continuation request: {received_tokens=} {language_req.partial_data['x']}")
            more = re.search("needs continuation", last_line)
            return MultimodalLanguageRequest(
                req, receiver, partial_data={}, received_tokens=0, needs_continuation=more)
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
            more = re.search("needs resume for remaining data", last_line)
            return MultimodalLanguageRequest(
                req, receiver, buffered_chunks={}, transferred_tokens=0, needs_resume=more)
    '''
    assert migrated(before) == dedent(after)


def test_a_subclass_and_its_tests_are_migrated() -> None:
    before = """\
        from unittest.mock import patch
        import torch
        from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingReceiver
        from .requests import needs_continuation

        class Receiver(MooncakeEmbeddingReceiver):
            __slots__ = ('partial_data', 'needs_continuation')

            def init_continuation(self, allocation, **more):
                super().init_continuation(allocation, received_tokens=getattr(self, 'received_tokens', 0))
                if self.partial_data is None:
                    raise RuntimeError('partial_data is missing')
                return replace(self, partial_data=torch.cat(self.partial_data))

        def test_it(r):
            with patch('x.MooncakeEmbeddingReceiver.init_continuation'), patch.object(r, 'partial_data'):
                match r:
                    case Request(needs_continuation=True): assert needs_continuation(r)
    """
    after = """\
        from unittest.mock import patch
        import torch
        from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingReceiver
        from .requests import needs_resume

        class Receiver(MooncakeEmbeddingReceiver):
            __slots__ = ('buffered_chunks', 'needs_resume')

            def resume_transfer(self, allocation, **more):
                super().resume_transfer(allocation, sent_tokens=getattr(self, 'transferred_tokens', 0))
                if self.buffered_chunks is None:
                    raise RuntimeError('buffered_chunks is missing')
                return replace(self, buffered_chunks=torch.cat(self.buffered_chunks))

        def test_it(r):
            with patch('x.MooncakeEmbeddingReceiver.resume_transfer'), patch.object(r, 'buffered_chunks'):
                match r:
                    case Request(needs_resume=True): assert needs_resume(r)
    """
    assert migrated(before) == dedent(after)
    assert doubtful_lines(before) == []


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import beluga\nsteps = beluga.init_continuation()\n", [3]),
        ("import httpx\nr = httpx.get(u)\nr.partial_data\n", [4]),
        ("import httpx\ndef f(r: httpx.Response): return r.partial_data\n", [3]),
        ("import httpx\nwith httpx.stream(u) as r:\n    r.received_tokens\n", [4]),
        ("import vendor\nvendor.upload(partial_data=1)\n", [3]),
        ("# partial_data of httpx\nimport httpx\nr = httpx.get(u)\ngetattr(r, 'partial_data')\n", [5]),
        ("from vendor import needs_continuation\nneeds_continuation(line)\n", [2, 3]),
        ("row = {'received_tokens': 3}\nrow['received_tokens']\n", [2, 3]),
        ("metrics = dict(received_tokens=3)\n", [2]),
        ("'{received_tokens}'.format(received_tokens=3)\n", [2]),
        ("log.info('%(received_tokens)d', row)\n", [2]),
        ("sql('SELECT received_tokens FROM t')\n", [2]),
        ("kind = 'continuation'\n", [2]),
        ("def handle_continuation(room): ...\n", [2]),
        ("self._continuation_queue = f(is_continuation=1)\nprint(is_continuation)\n", [2]),
        ("found = 'continuation' in line\n", [2]),
        ("vars(r)['partial_data'], f(**{'received_tokens': 1})\n", [2]),
        ("import httpx\nself.r = httpx.get(u)\ndef f(): return self.r.partial_data\n", [4]),
        ("import httpx\nfor a, b in f(httpx), httpx.stream(u): b.partial_data\n", [3]),
        ("import httpx\nasync def f(): return (await httpx.get(u)\n    .json()).partial_data\n", [4]),
        ("send(needs_continuation=1, needs_resume=1)\n", [2]),
        ("r.needs_continuation = r.needs_resume = False\n", [2]),
        ("def f(r):\n    needs_resume = 1\n    needs_continuation = r.needs_continuation\n", [4]),
        ("class R:\n    def resume_transfer(self): ...\n    init_continuation = resume_transfer\n", [4]),
    ],
)
def test_a_name_that_may_belong_to_other_code_is_left_alone_and_listed(code: str, lines: list[int]) -> None:
    assert migrated(IMPORT + code) == IMPORT + code
    assert doubtful_lines(IMPORT + code) == lines


@pytest.mark.parametrize(
    "code",
    [
        "# a line continuation\nx = 1  # UTF-8 continuation byte\n",
        "line_continuation = continuation_byte = 5\n",
        "def f(line):\n    continuation = line.endswith('\\\\')\n    return continuation\n",
        "def f(continuation_offset=0): ...\n",
        "self.my_partial_data = other.partial_data_of\n",
    ],
)
def test_a_name_that_means_something_else_is_left_alone(code: str) -> None:
    assert migrated(IMPORT + code) == IMPORT + code


def test_a_parameter_of_the_method_itself_is_left_alone_and_listed() -> None:
    code = "def init_continuation(room, received_tokens): ...\ninit_continuation(1, received_tokens=2)\n"
    assert migrated(IMPORT + code) == IMPORT + code.replace("init_continuation", "resume_transfer")
    assert doubtful_lines(IMPORT + code) == [2, 3]


RECEIVER = IMPORT + "def f(receiver, i, a, n, **more):\n    "


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ("init_continuation()", "resume_transfer()"),
        ("init_continuation(None, a, n)", "resume_transfer(allocation=a, sent_tokens=n)"),
        ("init_continuation(None , a,)", "resume_transfer(allocation=a,)"),
        ("init_continuation(None)", "resume_transfer()"),
        ("init_continuation(None, sent_tokens=n)", "resume_transfer(sent_tokens=n)"),
        ("init_continuation(embedding_index=None, allocation=a)", "resume_transfer(allocation=a)"),
        ("init_continuation(allocation=a, embedding_index=None)", "resume_transfer(allocation=a)"),
        ("init_continuation(allocation=a, sent_tokens=n)", "resume_transfer(allocation=a, sent_tokens=n)"),
        ("init_continuation(a, received_tokens=n)", "resume_transfer(a, sent_tokens=n)"),
        ("init_continuation(a, continuation_offset=n)", "resume_transfer(a, sent_tokens=n)"),
    ],
)
def test_calls_of_the_old_signature_become_calls_with_keywords(call: str, wanted: str) -> None:
    """The old one was (embedding_index=None, allocation=None, sent_tokens=0)."""
    code = RECEIVER + f"receiver.{call}\n"
    assert migrated(code) == RECEIVER + f"receiver.{wanted}\n"
    assert doubtful_lines(code) == []


@pytest.mark.parametrize(
    "arguments", ["i", "i, a", "i, a, n", "None, a, n, 1", "*a", "None, *a", "**more", "embedding_index=i"]
)
def test_calls_that_may_have_given_a_buffer_index_are_listed(arguments: str) -> None:
    code = RECEIVER + f"receiver.init_continuation({arguments})\n"
    assert migrated(code) == code.replace("init_continuation", "resume_transfer")
    assert doubtful_lines(code) == [3]


def test_a_definition_of_the_old_signature_is_listed() -> None:
    code = IMPORT + "def init_continuation(self, embedding_index=None, allocation=None, sent_tokens=0): ...\n"
    assert migrated(code) == code.replace("init_continuation", "resume_transfer")
    assert doubtful_lines(code) == [2]


OWN_FILE = '''\
    """Supports continuation of large embeddings; a line continuation is another thing."""
    # Continuations are sent to all ranks; received_length counts
    logger.debug(f"Blocks for continuation: {n} tokens")
    logger.warning(f"Received continuation for unknown room {room}")
    logger.info("%s needs continuation", req)
    raise ValueError("no continuation: received_length is unknown")
'''
NEW_OWN_FILE = '''\
    """Supports resume of large embeddings; a line continuation is another thing."""
    # Resumes are sent to all ranks; transferred_length counts
    logger.debug(f"Blocks for resume: {n} tokens")
    logger.warning(f"Received resume for unknown room {room}")
    logger.info("%s needs resume for remaining data", req)
    raise ValueError("no resume: transferred_length is unknown")
'''


@pytest.mark.parametrize("path", ["fork/disaggregation/utils.py", "conn_multimodal.py"])
def test_texts_of_the_systems_own_files_lose_the_old_word(path: str) -> None:
    assert migrated(OWN_FILE, path) == dedent(NEW_OWN_FILE)
    assert "# Continuations" in migrated(OWN_FILE, assume=True), "elsewhere the word may mean something else"


def test_each_doubtful_place_has_a_reason() -> None:
    code = IMPORT + "import httpx\nhttpx.get(u).partial_data\nx = {'received_tokens': 1}\ndef is_continuation(): ...\n"
    reasons = [reason for _, reason in rewrite(code.encode(), PurePath("mine.py"))[1]]
    expected = [
        ("partial_data", "another library"),
        ("received_tokens", "your own"),
        ("is_continuation", "your own"),
    ]
    assert all(name in reason and why in reason for reason, (name, why) in zip(reasons, expected, strict=True))


@pytest.mark.parametrize(
    "code",
    [
        "import httpx\nresponse.partial_data\n",
        "import sglang\nx.needs_continuation\n",
        "from .embferry import x\nx.received_tokens\n",
    ],
)
def test_a_file_that_does_not_use_the_system_is_left_alone_and_listed(code: str) -> None:
    assert migrated(code) == code
    assert doubtful_lines(code) == [0]
    assert migrated(code, assume=True) != code


@pytest.mark.parametrize(
    "line",
    [
        "import embferry",
        "from embferry.disaggregation import utils",
        "import os, sglang.srt.disaggregation.utils",
        "from ..mooncake.conn_multimodal import X",
        "class Mine(MooncakeEmbeddingReceiver): ...",
        "p = 'sglang.srt.disaggregation.multimodal_language.X'",
    ],
)
def test_an_import_or_a_class_shows_that_a_file_uses_the_system(line: str) -> None:
    assert migrated(f"{line}\nx.needs_continuation\n") == f"{line}\nx.needs_resume\n"


@pytest.mark.parametrize("path", ["fork/disaggregation/utils.py", "a/multimodal_language.py"])
def test_the_systems_own_files_are_known_by_their_path(path: str) -> None:
    assert migrated("x.needs_continuation\n", path) == "x.needs_resume\n"


def test_an_import_of_the_users_own_module_is_not_another_librarys() -> None:
    code = IMPORT + "from serving import build\nr = build()\nr.partial_data\n"
    assert migrated(code) == code
    assert "r.buffered_chunks" in migrated(code, own=frozenset({"serving"}))


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
    new = rewrite(data, PurePath("mine.py"))[0]
    assert new == data.replace(b"needs_continuation", b"needs_resume")


@pytest.mark.parametrize(
    "data",
    [
        b"print 'needs_continuation'\n",
        b"x.needs_continuation # \xff\n",
        b"# coding: nowhere\n#",
        b"\x0cx.partial_data\n",
    ],
)
def test_a_file_that_cannot_be_read_is_left_alone(data: bytes) -> None:
    with pytest.raises(RewriteError):
        rewrite(data, PurePath("mine.py"))

"""The documents of `research`: what is read from files, what the index finds, and how it follows them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.documents import folder
from worker.documents import index as index_module
from worker.documents.folder import READERS, quotable_text
from worker.documents.index import Found, Index, Stopped, index_of, query_words
from worker.documents.markup import markdown, plain_text, restructured_text
from worker.documents.text import PASSAGE_CHARS, SENTENCE_CHARS, Block, Document, normalise, passages, sentences
from worker.documents.webpage import extracted_text, webpage

CORPUS = Path(__file__).parent.parent / "corpus"


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one document; changes are seen at once."""
    monkeypatch.setattr(index_module, "RESCAN_SECONDS", 0.0)
    write(tmp_path, "zebra.md", "# Zebras\n\nNo two zebras have the same stripes.\n")
    return tmp_path


@pytest.fixture(scope="module")
def corpus() -> Index:
    return Index(CORPUS)


def write(root: Path, path: str, text: str | bytes) -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode() if isinstance(text, str) else text)
    return target


def paths(found: Found) -> set[str]:
    return {hit.path for hit in found.hits}


def texts(document: Document) -> list[str]:
    return [piece.text for block in document.blocks for piece in sentences(block)]


def spoken(text: str) -> list[str]:
    return [piece.text for piece in sentences(Block("", ((1, text),)))]


# Reading


def test_markdown_is_read_without_its_code_comments_and_rulers() -> None:
    document = markdown(
        "\n".join(
            [
                "[![build](badge.svg)](ci)",
                "# The *title*",
                "<!-- a comment",
                "that goes on -->",
                "First paragraph,",
                "on two lines. Second sentence.",
                "",
                "```python",
                "print('code')",
                "```",
                "    indented = code",
                "",
                "Setext heading",
                "--------------",
                "- an item",
                "  that goes on",
                "1. a numbered item",
                "",
                "| Name | Meaning |",
                "|------|---------|",
                "| one | the first |",
                "",
                "***",
                "> A quotation.",
                "",
                "[link]: https://example.org",
                "[^1]: A footnote.",
            ]
        ),
        "name",
    )
    assert document.title == "The title"
    assert texts(document)[1:] == [
        "First paragraph, on two lines.",
        "Second sentence.",
        "an item that goes on",
        "a numbered item",
        "Name | Meaning",
        "one | the first",
        "A quotation.",
        "A footnote.",
    ]
    assert {block.heading for block in document.blocks} == {"", "Setext heading"}


def test_front_matter_gives_the_title_and_no_text() -> None:
    document = markdown('---\ntitle: "From the front"\ntags: [a]\n---\n# Heading\n\nThe body text.\n', "name")
    assert document.title == "From the front"
    assert texts(document) == ["The body text."]
    assert document.blocks[0].lines[0][0] == 7


def test_a_heading_below_another_one_is_shown_with_it() -> None:
    document = markdown("# Top\n## Install\n### Linux\nUse the package.\n## Use\nJust run it.\n", "name")
    assert [block.heading for block in document.blocks] == ["Install › Linux", "Use"]


def test_restructured_text_is_read_without_code_and_directives() -> None:
    document = restructured_text(
        "\n".join(
            [
                "=====",
                "Title",
                "=====",
                ".. a comment",
                "   of two lines",
                "",
                "A paragraph with an example::",
                "",
                "    code = 1",
                "",
                "    more = 2",
                "",
                "Section",
                "-------",
                ".. note:: A note.",
                "   It goes on.",
                "",
                ".. code-block:: python",
                "   :linenos:",
                "",
                "   hidden = True",
                "",
                ">>> doctest",
                "hidden",
                "",
                "- an item",
                "",
                "===== =======",
                "Name  Meaning",
                "===== =======",
                "one   the first",
                "===== =======",
            ]
        ),
        "name",
    )
    assert document.title == "Title"
    assert texts(document) == [
        "A paragraph with an example::",
        "A note.",
        "It goes on.",
        "an item",
        "Name Meaning",
        "one the first",
    ]
    assert [block.heading for block in document.blocks][:2] == ["", "Section"]


def test_short_lines_that_stand_alone_are_the_titles_of_plain_text() -> None:
    document = plain_text("A Title\n\nSome text that is here.\n\nA part\n\nMore text,\non two lines.\n", "name")
    assert document.title == "A Title"
    assert [(block.heading, len(block.lines)) for block in document.blocks] == [("", 1), ("A part", 2)]


def test_the_items_of_a_list_in_plain_text_are_blocks_and_no_titles() -> None:
    document = plain_text("A Title\n=======\n\n- one item\n\n- another item\n  that goes on\n---\nThe end.\n", "name")
    assert document.title == "A Title"
    assert texts(document) == ["one item", "another item that goes on", "The end."]


def test_a_web_page_is_read_without_scripts_navigation_and_code() -> None:
    document = webpage(
        """<!DOCTYPE html><html><head><title>Page - Site</title><style>p { color: red }</style></head>
<body><nav><p>Home and more</p></nav><!-- <p>A comment</p> --><h1>Heading <a href="#h">#</a></h1>
<p>A <b>bold</b>ly written
   sentence &amp; more.<p>Unclosed, and 1 < 2.<script>if (a<b) hidden()</script>
<pre>code</pre><table><tr><th>Name</th><td>Value here</td></tr></table></body></html>""",
        "name",
    )
    assert document.title == "Heading"
    assert texts(document) == ["A boldly written sentence & more.", "Unclosed, and 1 < 2.", "Name Value here"]
    assert [block.lines[0][0] for block in document.blocks] == [3, 4, 5]


def test_a_document_without_headings_has_the_name_of_its_file(docs: Path) -> None:
    write(docs, "good_bread-recipes.md", "Knead the dough for ten minutes.\n")
    (hit,) = Index(docs).search("kneading dough").hits
    assert hit.passage.title == "good bread recipes"


def test_sentences_do_not_end_at_abbreviations_initials_and_numbers() -> None:
    assert spoken("Dr. A. Smith paid 3.50 vs. 4 (e.g. for St. John). Then he left! Why? “No idea.” He said.") == [
        "Dr. A. Smith paid 3.50 vs. 4 (e.g. for St. John).",
        "Then he left!",
        "Why?",
        "“No idea.”",
        "He said.",
    ]


def test_an_endless_sentence_is_cut_between_words() -> None:
    pieces = spoken("word " * 500 + "x" * 1000)
    assert all(len(piece) <= SENTENCE_CHARS for piece in pieces)
    assert " ".join(pieces).replace(" ", "") == "word" * 500 + "x" * 1000


def test_passages_are_short_and_never_cross_a_heading() -> None:
    paragraph = "This is a sentence of a longer text. " * 30
    document = markdown(f"# One\n{paragraph}\n## Two\nAnother text.\n", "name")
    found = list(passages(document))
    assert all(len(passage.text) <= PASSAGE_CHARS for passage in found)
    assert [passage.heading for passage in found] == [""] * (len(found) - 1) + ["Two"]


markup = st.text(st.sampled_from("ab. \n\t#-=*_`~|>[]()<!:/&;\"'+1.é?\u3002\u2028\x0b\x0c\x85"), max_size=300)


@settings(max_examples=300)
@given(source=markup | st.text(max_size=300), suffix=st.sampled_from(sorted(READERS)))
def test_every_sentence_of_any_text_is_literally_in_it(source: str, suffix: str) -> None:
    whole = extracted_text(source) if READERS[suffix] is webpage else normalise(source)
    for passage in passages(READERS[suffix](source, "name")):
        for sentence in passage.sentences:
            assert sentence.text
            assert sentence.text in whole
            assert 1 <= sentence.line <= source.count("\n") + 1


@pytest.mark.parametrize("piece", ["<", "<a", "<a x='", "<!--", "<![x", "</", "<?", "&#x", "<script></scrip"])
@pytest.mark.timeout(20)
def test_a_broken_page_takes_no_more_time_than_its_size(docs: Path, piece: str) -> None:
    write(docs, "broken.html", piece * (1_000_000 // len(piece)))
    assert paths(Index(docs).search("zebra")) == {"zebra.md"}


# The index


def test_words_are_found_in_their_other_forms_and_without_accents(docs: Path) -> None:
    write(docs, "run.txt", "He was running through the cafés of Zürich.\n")
    index = Index(docs)
    assert "run.txt" in paths(index.search("runs"))
    assert "run.txt" in paths(index.search("cafe"))
    assert "run.txt" in paths(index.search("ZURICH"))


def test_a_title_weighs_more_than_the_body(docs: Path) -> None:
    write(docs, "a.md", "# Lions\n\nThey once met some tall giraffes there.\n")
    write(docs, "b.md", "# Giraffes\n\nThey live in the open savannah.\n")
    assert [hit.path for hit in Index(docs).search("giraffes").hits] == ["b.md", "a.md"]


def test_an_added_file_is_found(docs: Path) -> None:
    index = Index(docs)
    assert not index.search("giraffe").hits
    write(docs, "deep/down/giraffe.rst", "Giraffes have long necks.\n")
    assert paths(index.search("giraffe")) == {"deep/down/giraffe.rst"}


def test_a_changed_file_is_found_by_its_new_words_only(docs: Path) -> None:
    index = Index(docs)
    assert index.search("stripes").hits
    write(docs, "zebra.md", "# Zebras\n\nTheir stripe patterns confuse flies.\n")
    assert paths(index.search("flies")) == {"zebra.md"}
    assert not index.search("two same").hits


def test_a_removed_file_is_no_longer_found(docs: Path) -> None:
    index = Index(docs)
    assert index.search("zebra").documents == 1
    (docs / "zebra.md").unlink()
    found = index.search("zebra")
    assert (found.hits, found.documents, found.passages) == ((), 0, 0)


def test_a_file_replaced_by_an_older_one_of_the_same_size_is_noticed(docs: Path) -> None:
    before = write(docs, "a.txt", "The cat sat down.\n").stat()
    index = Index(docs)
    assert index.search("cat").hits
    other = write(docs, "b.new", "The dog sat down.\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(docs / "a.txt")
    assert paths(index.search("dog")) == {"a.txt"}


def test_a_folder_that_goes_away_and_comes_back_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "RESCAN_SECONDS", 0.0)
    index = Index(tmp_path / "later")
    assert index.search("zebra").documents == 0
    write(tmp_path, "later/zebra.md", "Zebras have stripes.\n")
    assert index.search("zebra").hits
    (tmp_path / "later").rename(tmp_path / "gone")
    assert not index.search("zebra").hits


def test_files_are_looked_at_once_in_a_while_only(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "RESCAN_SECONDS", 3600.0)
    index = Index(docs)
    index.search("zebra")
    (docs / "zebra.md").unlink()
    assert index.search("zebra").hits


def test_a_folder_has_one_index(docs: Path) -> None:
    found: list[Index] = []
    threads = [threading.Thread(target=lambda: found.append(index_of(docs))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_threads_may_search_while_files_change(docs: Path) -> None:
    index, failures = Index(docs), list[BaseException]()

    def search() -> None:
        try:
            for _ in range(20):
                assert "zebra.md" in paths(index.search("zebra stripes"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(20):
        write(docs, "other.txt", f"Sentence number {number} is about stripes.\n" * (number + 1))
    for thread in threads:
        thread.join()
    assert not failures


def test_a_stopped_search_ends_and_the_next_one_goes_on(docs: Path) -> None:
    for number in range(20):
        write(docs, f"{number}.txt", "Giraffes have long necks.\n")
    index, stop = Index(docs), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        index.search("giraffe", stop)
    assert index.search("giraffe").documents == 21


# Files that are none of its business


def test_a_file_that_is_not_utf8_is_read_as_far_as_it_goes(docs: Path) -> None:
    write(docs, "latin.txt", "Der gro\u00dfe Zebrastreifen ist breit.\n".encode("latin-1"))
    index = Index(docs)
    (hit,) = index.search("Zebrastreifen").hits
    assert hit.passage.text in quotable_text(docs, "latin.txt")


def test_a_byte_order_mark_and_foreign_line_ends_do_no_harm(docs: Path) -> None:
    write(docs, "dos.md", b"\xef\xbb\xbf# Giraffes\r\n\r\nThey have\r\nlong necks.\r\n")
    (hit,) = Index(docs).search("necks").hits
    assert (hit.passage.title, hit.passage.text, hit.passage.line) == ("Giraffes", "They have long necks.", 3)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (".hidden/zebra.md", "Zebras."),
        (".zebra.md", "Zebras."),
        ("node_modules/zebra/README.md", "Zebras."),
        (".venv/zebra.txt", "Zebras."),
        ("zebra.py", "# Zebras."),
        ("binary.txt", b"Zebras\0are here."),
        ("huge.txt", "Zebras are here. " * 130_000),
        ("empty.md", ""),
        ("noise.txt", "=" * 100 + " 1 2 3 | 4 5 6 zebra ++ -- 77.5 88.6 99.7"),
    ],
)
def test_what_is_no_document_is_left_out(docs: Path, path: str, content: str | bytes) -> None:
    write(docs, path, content)
    assert paths(Index(docs).search("zebras")) == {"zebra.md"}


def test_links_are_followed_to_files_inside_of_the_folder_only(
    docs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = write(tmp_path_factory.mktemp("elsewhere"), "secret.md", "Zebras are secret.\n")
    (docs / "outside.md").symlink_to(secret)
    (docs / "outside").symlink_to(secret.parent)
    (docs / "loop").symlink_to(docs)
    (docs / "self.md").symlink_to(docs / "self.md")
    (docs / "dangling.md").symlink_to(docs / "nothing.md")
    (docs / "inside.md").symlink_to(docs / "zebra.md")
    assert paths(Index(docs).search("zebra")) == {"zebra.md", "inside.md"}


def test_folders_and_pipes_with_the_name_of_a_document_are_left_out(docs: Path) -> None:
    write(docs, "folder.md/inner.md", "Zebras inside.\n")
    os.mkfifo(docs / "pipe.md")
    assert paths(Index(docs).search("zebra")) == {"zebra.md", "folder.md/inner.md"}


def test_a_name_that_is_not_utf8_is_skipped(docs: Path) -> None:
    with open(os.fsencode(docs) + b"/zebra-\xff.md", "wb") as file:
        file.write(b"Zebras.\n")
    assert paths(Index(docs).search("zebra")) == {"zebra.md"}


def test_a_file_that_breaks_its_reader_is_skipped_with_one_warning(
    docs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(source: str, name: str) -> Document:
        raise AssertionError("cannot read this")

    monkeypatch.setitem(folder.READERS, ".rst", broken)
    index = Index(docs)
    for content in ("Zebras.", "More zebras."):
        write(docs, "broken.rst", content)
        assert paths(index.search("zebra")) == {"zebra.md"}
    assert [record.message for record in caplog.records if "broken.rst" in record.message] == [
        "skipped 'broken.rst': cannot read this"
    ]


# Queries from users


@pytest.mark.parametrize(
    "query",
    [
        "",
        "   \n\t",
        "what is it about?",
        '"',
        "'",
        '""" OR "',
        "zebra AND",
        "NEAR(zebra stripes, 2)",
        "title : zebra",
        "{title heading}: zebra",
        "-zebra",
        "^zebra*",
        "zebra\0stripes",
        "\ud800 zebra \udfff",
        "🦓 🦓🏽",
        "(((",
        "; DROP TABLE passages; --",
        "\u0301\u0302",
        "½ ⅷ ① 𞤀",
        "zebra " * 20_000,
        " ".join(f"word{number}" for number in range(15_000)),
        "x" * 100_000,
        '"' * 100_000,
    ],
    ids=lambda query: ascii(query[:20]),
)
def test_no_query_is_a_syntax_error(corpus: Index, query: str) -> None:
    found = corpus.search(query)
    assert len(found.hits) <= index_module.MAX_HITS


operators = st.lists(
    st.sampled_from(["AND", "OR", "NOT", "NEAR(", ")", '"', "'", "*", "^", ":", "-", "+", "{", "}", ",", "sea"])
)


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=60) | operators.map(" ".join) | operators.map("".join))
def test_no_text_is_a_syntax_error(query: str) -> None:
    found = index_of(CORPUS).search(query)
    assert all(weight > 0 for weight in found.weights.values())
    assert all(0 <= hit.score <= 1 for hit in found.hits)


def test_operators_are_words_like_others(docs: Path) -> None:
    write(docs, "near.txt", "The near field of an antenna.\n")
    assert paths(Index(docs).search("NEAR")) == {"near.txt"}


def test_a_query_of_stop_words_has_no_words() -> None:
    assert query_words("What is the difference, and why?") == []
    assert query_words("Why don't zebras' stripes — the zebras' — fade?") == ["zebras", "stripes", "fade"]


def test_a_query_keeps_the_first_words_of_many() -> None:
    words = query_words(" ".join(f"word{number}" for number in range(1000)))
    assert words == [f"word{number}" for number in range(index_module.MAX_TERMS)]

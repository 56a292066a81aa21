import pytest

from engram.data.extractors import html_to_text, pod_to_text, rst_to_text, tidy

PAGE = """<?xml version="1.0"?><!DOCTYPE html><html><head><title>No</title><style>p {}</style></head><body>
<div id="banner">Buy this</div><ul class="docnav top"><li>Next</li></ul>
<header>Menu</header><div id="main"><h1>Titel &amp; mehr</h1><p>One
   <b>bold</b>, <a name="x"></a>caf&eacute;<br/>next</p><script>var x = "<p>";</script>
<pre>
  keep   this
      indent
</pre><ul><li>first<li>second</ul><p>3&nbsp;&lt;&nbsp;4<img src="a"></p>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>
<span class="a MAC">Cmd</span></div><p>after</p></body></html>"""


def test_html_page() -> None:
    assert html_to_text(PAGE, skipped=frozenset(("banner", "docnav", "MAC"))) == (
        "Titel & mehr\n\nOne bold, café\nnext\n\n  keep   this\n      indent\n\nfirst\nsecond\n\n3\u00a0<\u00a04\n\n"
        "a b\nc\n\nafter\n"
    )


def test_html_element() -> None:
    text = html_to_text(PAGE, root_id="main")
    assert text.startswith("Titel & mehr\n\nOne bold") and text.endswith("a b\nc\n\nCmd\n")


@pytest.mark.parametrize("page", ["<p>a</div></p>b", "<div><p>a", "</p>a<", "<p>a<!-- <p>c --></p>"])
def test_broken_html_gives_its_text(page: str) -> None:
    assert html_to_text(page).startswith("a")


def test_rst() -> None:
    source = """.. SPDX-License-Identifier: GPL-2.0

.. _label:

=======
 Title
=======

.. module:: mod
   :synopsis: gone

See :func:`~mod.run` and :ref:`the text <label>`, ``code(*a, **k)``, `link <http://x>`_, **bold**, *it*,
:rfc:`2822`, :pep:`8`, `other`_ and 2 * 3 * 4.

Part
----

.. note:: mind the gap

   inside the note

.. code-block:: c

   /* comment */
   int *p, *q;

.. toctree::
   :maxdepth: 2

   one
   two

Example::

    >>> a
    ...
    5

.. function:: f(x)

   Does it.
"""
    assert rst_to_text(source) == (
        " Title\n\nSee mod.run and the text, code(*a, **k), link, bold, it,\nRFC 2822, PEP 8, other and 2 * 3 * 4.\n\n"
        "Part\n\nnote: mind the gap\n\n   inside the note\n\ncode-block: c\n\n   /* comment */\n   int *p, *q;\n\n"
        "Example:\n\n    >>> a\n    ...\n    5\n\nfunction: f(x)\n\n   Does it.\n"
    )


def test_pod() -> None:
    source = """code before

=encoding utf8

=head1 NAME
X<gone>

perlx - B<bold>, C<< a->b >>, F</etc/x>, L<perlre>, L<text|perlop>, L<perlvar/"$x">, L<http://a/b>

=over 4

=item *

bullet

=item C<name>

E<lt>tagE<gt>, I<nested C<code>>, E<eacute>E<233>, A<=>B

=back

=begin html

<p>

=end html

    verbatim   B<stays>

=cut

code after
"""
    assert pod_to_text(source) == (
        "NAME\n\nperlx - bold, a->b, /etc/x, perlre, text, perlvar, $x, http://a/b\n\n* bullet\n\n* name\n\n"
        "<tag>, nested code, eacuteé, A<=>B\n\n    verbatim   B<stays>\n"
    )


def test_tidy() -> None:
    assert tidy("\n\na  \n\n\n\n\tb\n \nc") == "a\n\n\tb\n\nc\n"
    assert tidy("") == "\n"

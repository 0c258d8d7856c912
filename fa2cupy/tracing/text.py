"""Text that the user wrote instead of a function: CUDA C++, an expression or statements with a return.

What is refused here would not stay inside the function. It is no sandbox: the text is code that runs on the GPU.
"""

from __future__ import annotations

import re

from fa2cupy.errors import InvalidArgument

__all__ = ["MAX_BYTES", "RESERVED", "checked_body", "words_of"]

MAX_BYTES = 4096
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FORBIDDEN = {
    "asm": "instructions have their own functions",
    "goto": "use if and for",
    "extern": "nothing is declared in a function",
    "static": "nothing is kept between elements",
    "namespace": "nothing is declared in a function",
    "using": "nothing is declared in a function",
    "template": "nothing is declared in a function",
    "new": "elements have no memory",
    "delete": "elements have no memory",
    "malloc": "elements have no memory",
    "free": "elements have no memory",
    "threadIdx": "an element does not know its thread",
    "blockIdx": "an element does not know its thread",
}
# What no array may be called: words of C++, and of the functions around the text.
RESERVED = frozenset(
    _WORD.findall("""
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float
    for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private
    protected public register reinterpret_cast return short signed sizeof static static_assert static_cast struct
    switch template this thread_local throw true try typedef typeid typename union unsigned using virtual void
    volatile wchar_t while xor xor_eq score b h q_idx kv_idx q_pos captures kInfinity not_a_number add sub mul neg
    abs min max where floor_div floor_mod shift_left shift_right exp log tanh sqrt sigmoid floor
    """)
)


def checked_body(name: str, text: str) -> str:
    """The body of a function: the text, or what returns it. InvalidArgument for what may not be in it."""
    if len(text.encode()) > MAX_BYTES:
        raise InvalidArgument(f"{name} has {len(text.encode())} bytes of text: at most {MAX_BYTES} are supported")
    if not text.strip():
        raise InvalidArgument(f"{name} is an empty text: an expression, or statements with a return, is needed")
    refused = {"#": "directives", "\\": "continued lines", '"': "strings", "'": "characters"}
    for letter, what in refused.items():
        if letter in text:
            raise InvalidArgument(f"{name} has {letter} in its text: {what} are not supported")
    if "/*" in _COMMENT.sub("", text):
        raise InvalidArgument(f"{name} has a comment in its text that does not end")
    code = _without_comments(text)
    for word in _WORD.findall(code):
        if word in _FORBIDDEN:
            raise InvalidArgument(f"{name} has {word} in its text, which is not supported: {_FORBIDDEN[word]}")
        if "__" in word:
            raise InvalidArgument(
                f"{name} has {word} in its text: names with two underscores, barriers and votes among them, are not "
                "supported"
            )
    _check_brackets(name, code)
    if "return" in _WORD.findall(code):
        return text
    if ";" in code:
        raise InvalidArgument(f"{name} has statements without a return: an expression, or a return, is needed")
    return f'return (\n#line 1 "{name}"\n{text}\n);'


def words_of(text: str) -> set[str]:
    """The names in it, comments apart."""
    return set(_WORD.findall(_without_comments(text)))


def _without_comments(text: str) -> str:
    return _COMMENT.sub(" ", text)


def _check_brackets(name: str, code: str) -> None:
    """None closes what is not open: the text stays inside its function."""
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for letter in code:
        if letter in pairs.values():
            stack.append(letter)
        elif letter in pairs and (not stack or stack.pop() != pairs[letter]):
            raise InvalidArgument(f"{name} has a {letter} in its text that closes nothing")
    if stack:
        raise InvalidArgument(f"{name} has a {stack[-1]} in its text that is never closed")

"""A seeded grammar of short stories, and the reader that checks a text against it."""

from dgemma.train.stories.reader import check, consistency
from dgemma.train.stories.tell import Story, make_chat, make_story

__all__ = ["Story", "check", "consistency", "make_chat", "make_story"]

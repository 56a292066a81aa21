"""A world of invented facts, the same for the same seed: who it holds, the documents that state it, how to ask."""

from engram.data.world.documents import documents
from engram.data.world.facts import Entity, Person, World, build_world
from engram.data.world.lexicon import RELATIONS

__all__ = ["RELATIONS", "Entity", "Person", "World", "build_world", "documents"]

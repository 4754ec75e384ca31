"""Watch one forward of any module, and find which dims of its parameters can be cut together."""

from shardproof.watching.choice import Choice, choose
from shardproof.watching.family import Event, Family, families
from shardproof.watching.forward import Watched, watch

__all__ = ["Choice", "Event", "Family", "Watched", "choose", "families", "watch"]

"""Watch one forward of any module and find what can be cut apart, without a rule about a model."""

from shardproof.watching.choice import Choice, choose
from shardproof.watching.family import Event, Family, families
from shardproof.watching.forward import Watched, watch

__all__ = ["Choice", "Event", "Family", "Watched", "choose", "families", "watch"]

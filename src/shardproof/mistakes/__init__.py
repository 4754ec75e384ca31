"""Mistakes that people make in tensor parallelism: each planted, seen, and named by the prover."""

from shardproof.mistakes.edit import Edit as Edit
from shardproof.mistakes.gallery import CHAPTERS as CHAPTERS
from shardproof.mistakes.gallery import all_mistakes as all_mistakes
from shardproof.mistakes.gallery import find_mistake as find_mistake
from shardproof.mistakes.mistake import Finding as Finding
from shardproof.mistakes.mistake import Mistake as Mistake

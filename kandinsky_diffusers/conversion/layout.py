"""One folder per repository, or repositories that need no other."""

from __future__ import annotations

from dataclasses import replace

from .errors import ConversionError
from .recipe import Component, Joined, Release, Repo


LAYOUTS = ("split", "combined")


def arrange(release: Release, layout: str) -> Release:
    """``release`` with the repositories of a layout.

    Args:
        release: as its family describes it.
        layout: ``split`` leaves it as it is; ``combined`` puts the components of the repository that several need
            into each of them, and leaves it out itself.

    Raises:
        ConversionError: the layout is unknown, or the release does not have it.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"layout is {layout!r}; accepted are {', '.join(LAYOUTS)}.")
    if layout == "split":
        return release
    named = {repo.name: repo for repo in release.repos}
    needed = {(repo.joined.repo, repo.joined.prefix) for repo in release.repos if repo.joined}
    if not needed:
        raise ConversionError(f"layout is combined, but no repository of {release.title} needs another; use split.")
    # made once, so that a model which several repositories take in is converted once
    parts = {(name, prefix): _prefixed(named[name], prefix) for name, prefix in needed}
    repos = (
        _join(repo, repo.joined, parts[repo.joined.repo, repo.joined.prefix]) if repo.joined else repo
        for repo in release.repos
        if repo.name not in {name for name, _ in needed}
    )
    return replace(release, repos=tuple(repos), layout=layout)


def layouts_of(release: Release) -> list[Release]:
    """``release`` in each of the layouts that it has."""
    joined = any(repo.joined for repo in release.repos)
    return [arrange(release, layout) for layout in (LAYOUTS if joined else LAYOUTS[:1])]


def _prefixed(repo: Repo, prefix: str) -> tuple[Component, ...]:
    return tuple(replace(component, name=prefix + component.name) for component in repo.components)


def _join(repo: Repo, joined: Joined, parts: tuple[Component, ...]) -> Repo:
    components = repo.components + parts
    return replace(repo, pipeline=joined.pipeline, components=components, smoke=joined.smoke, joined=None)

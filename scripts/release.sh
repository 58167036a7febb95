#!/usr/bin/env bash
# Makes a release: sets the version, dates what CHANGELOG.md has under "Unreleased", commits, tags. It pushes nothing.
#
#   bash scripts/release.sh 0.2.0
set -euo pipefail
cd "$(dirname "$0")/.."
refuse() {
  echo "release.sh: $1" >&2
  exit 2
}
[ $# -eq 1 ] || refuse "takes the new version and nothing else, such as 0.2.0, not $# arguments"
new=$1
old=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' hf_kvattn/__init__.py)
number='(0|[1-9][0-9]*)'
[[ $new =~ ^$number\.$number\.$number$ ]] || refuse "version '$new' is not three numbers with dots, such as 0.2.0"
[ "$new" != "$old" ] && printf '%s\n' "$old" "$new" | sort --check=quiet --version-sort ||
  refuse "version $new is not newer than $old"
! git rev-parse --quiet --verify "refs/tags/v$new" >/dev/null || refuse "the tag v$new exists already"
branch=$(git branch --show-current)
[ "$branch" = main ] || refuse "releases are made on main, not on '$branch'"
[ -z "$(git status --porcelain)" ] || refuse "the tree is not clean: $(git status --porcelain | head -n 1)"
awk '/^## /{within = /^## \[Unreleased\]$/} within && /^- /{found = 1} END{exit !found}' CHANGELOG.md ||
  refuse "CHANGELOG.md says nothing under '## [Unreleased]'"

sed -i "s/^__version__ = .*/__version__ = \"$new\"/" hf_kvattn/__init__.py
sed -i "s/^## \[Unreleased\]$/&\n\n## [$new] - $(date +%F)/" CHANGELOG.md
git commit --quiet --message "Version $new" hf_kvattn/__init__.py CHANGELOG.md
git tag --annotate --message "Version $new" "v$new"
echo "v$new is made here. To publish it: git push origin main v$new"

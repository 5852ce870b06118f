#!/bin/sh
# debootstrap-base.sh [NAME]: a Debian 12 with Python as a local image, for builds that have no
# registry to pull from. NAME: localhost/kleash-base:bookworm unless given.
# Needs root, debootstrap and buildah; takes a minute. KLEASH_DEBIAN_MIRROR: URL of a mirror.
set -eu

name=${1:-localhost/kleash-base:bookworm}
container=$(buildah from scratch)
trap 'buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")

debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
    bookworm "$root" ${KLEASH_DEBIAN_MIRROR:+"$KLEASH_DEBIAN_MIRROR"} >&2

# As the slim images of Debian: no package lists, no manuals; the licences stay.
find "$root/var/cache/apt" "$root/var/lib/apt/lists" "$root/var/log" -type f -delete
rm -rf "$root/usr/share/man" "$root/usr/share/info" "$root/usr/share/locale"
find "$root/usr/share/doc" -type f ! -name copyright -delete

buildah umount "$container" >/dev/null
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    --cmd python3 "$container"
buildah commit --quiet "$container" "$name"

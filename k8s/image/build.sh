#!/bin/sh
# build.sh [ARGUMENT...]: build the image with buildah. Arguments go to `buildah build`:
#   --build-arg VARIANT=cuda, --build-arg TORCH_INDEX=URL, --build-arg BASE_IMAGE=NAME, --target vllm
# KLEASH_IMAGE: name of the result, localhost/kleash:VERSION unless set.
# KLEASH_BUILD_VOLUMES: more of FROM:TO:ro, with spaces between.
# PYTHON: the interpreter whose configuration of pip the build takes over; python3 unless set.
set -eu

cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
image=${KLEASH_IMAGE:-localhost/kleash:$version}
revision=$(git rev-parse HEAD 2>/dev/null || echo)
settings=$(mktemp -d)
trap 'rm -rf "$settings"' EXIT

# Chroot needs the fewest rights of buildah's ways to isolate a step: it works inside containers.
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"

# A volume leaves its empty mount point in each layer that is made while it is there. First the one
# stage of the image that runs commands, without volumes; below it comes from the cache.
case " $* " in
*" vllm "* | *"=vllm "*) system=vllm-system ;;
*) system=system ;;
esac
buildah build --layers "$@" --target "$system" .

case " $* " in
*" --target"*) ;;
*) set -- --target kleash "$@" ;;
esac
volumes=$("$python" k8s/image/pip_settings.py "$settings/pip.conf")
for volume in $volumes ${KLEASH_BUILD_VOLUMES:-}; do
    set -- --volume "$volume" "$@"
done
buildah build --layers --secret "id=pip,src=$settings/pip.conf" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --tag "$image" "$@" .

#!/bin/sh
# install.sh ARGUMENT...: pip install ARGUMENT... into /opt/kleash, compile it, and copy what is new
# to /layer, from where the image takes it as one layer. Runs in the build stages of the Dockerfile.
set -eu

environment=/opt/kleash
started=$(mktemp)
modules=$(mktemp)

# Bytecode is made below; pip would stamp it with dates, and a start would compare them.
/opt/pip/bin/pip --python "$environment/bin/python" install --no-compile "$@"

# torch requires setuptools to build extensions; nothing is built in the image, so that it, headers,
# and the tests that wheels carry (a sixth of the image) stay out. KLEASH_KEEP=1 keeps them.
site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ -z "${KLEASH_KEEP:-}" ]; then
    cd "$site"
    rm -rf setuptools setuptools-*.dist-info pkg_resources _distutils_hack \
        distutils-precedence.pth torch/include torch/share torch/test \
        torch/bin/protoc* torch/bin/test_* torch/bin/*Test
    find . -newer "$started" -type d -name tests -prune -exec rm -rf {} +
fi

find "$environment" -newer "$started" -type f -name '*.py' >"$modules"
# Packages carry a few templates that are no Python, named .py: compileall reports them and goes on.
"$environment/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash -i "$modules" \
    || echo "install.sh: the files above are not compiled"

mkdir -p /layer
cd /
find "${environment#/}" -newer "$started" ! -type d \
    -exec cp --archive --link --parents --target-directory=/layer {} +
rm -f "$started" "$modules"

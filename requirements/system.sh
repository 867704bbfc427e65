#!/bin/sh
# system.sh WHAT PACKAGE PURPOSE: make sure that a program or shared library is there.
# Installs the Debian package where that needs no questions (root, apt-get); else says what to do and goes on.
what=$1 package=$2 purpose=$3
command -v "$what" >/dev/null 2>&1 && exit 0
ldconfig -p 2>/dev/null | grep -q "$what" && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "install: Debian package $package ($purpose)" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package"; } >/dev/null 2>&1 && exit 0
fi
echo "install: $what is missing ($purpose); run: sudo apt-get install $package" >&2
exit 0

#!/bin/sh
# system.sh NAME PACKAGE PURPOSE: install a Debian package if its program or shared library NAME is missing.
# As root with apt-get it installs without questions. Otherwise it prints the command to run, and the caller continues.
name=$1 package=$2 purpose=$3
command -v "$name" >/dev/null 2>&1 && exit 0
ldconfig -p 2>/dev/null | grep -q "$name" && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "install: installing Debian package $package ($purpose)" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package"; } >/dev/null 2>&1 && exit 0
fi
echo "install: $name is missing ($purpose). Run: sudo apt-get install $package" >&2
exit 0

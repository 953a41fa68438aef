#!/bin/sh
# Installs what Qt's window and the virtual screen need, through apt where the person may; else prints the one line to type.
set -u
packages="xvfb xauth libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 libdbus-1-3 libfontconfig1 libxkbcommon-x11-0
libxcb-cursor0 libxcb-icccm4 libxcb-image0 libxcb-keysyms1 libxcb-randr0 libxcb-render-util0 libxcb-shape0
libxcb-xinerama0 libxcb-xkb1 fonts-dejavu-core"
command -v apt-get >/dev/null 2>&1 || exit 0 # not a Debian: Qt's wheels bring most of it
"${PYTHON:-python3}" -c "import ensurepip" 2>/dev/null || packages="$packages python3-venv"

installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q "install ok installed"; }
missing=""
for p in $packages; do
	installed "$p" || installed "${p}t64" || missing="$missing $p" # newer Debians renamed some: libglib2.0-0t64
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ]; then
	as=""
elif sudo -n true 2>/dev/null; then
	as="sudo"
else
	echo "System packages are missing. Please type: sudo apt-get update && sudo apt-get install -y$missing"
	exit 0
fi
$as apt-get update -qq
known=""
for p in $missing; do
	if apt-cache show "$p" >/dev/null 2>&1; then known="$known $p"; elif apt-cache show "${p}t64" >/dev/null 2>&1; then known="$known ${p}t64"; fi
done
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $as apt-get install -y -qq --no-install-recommends $known >/dev/null ||
	echo "apt could not install them. Please type: $as apt-get install -y$missing"
exit 0

# bash completion for nydusctl; made by scripts/reference: do not edit.
_nydusctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' i word
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --blob|--config|--interval|--mountpoint|--output|--png|--sock|--source|--to|--turns|--type|-I|-S|-c|-i|-m|-n|-o|-s|-t) ((i++)); continue ;;
        esac
        case "$path/$word" in
            /set|/set/log-level|/metrics|/metrics/backend|/metrics/cache|/metrics/fsstats|/list|/info|/mount|/umount|/cache|/workers|/top|/trace|/bugreport) path=$path/$word ;;
        esac
    done
    case "$path $prev" in
        " -S"|" --sock") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/metrics/backend -m"|"/metrics/backend --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/metrics/backend -I"|"/metrics/backend --interval") COMPREPLY=(); return ;;
        "/metrics/cache -m"|"/metrics/cache --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/metrics/fsstats -m"|"/metrics/fsstats --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/mount -s"|"/mount --source") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/mount -c"|"/mount --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/mount -m"|"/mount --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/mount -t"|"/mount --type") COMPREPLY=($(compgen -W 'rafs passthrough_fs' -- "$cur")); return ;;
        "/umount -m"|"/umount --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/cache --to") COMPREPLY=(); return ;;
        "/cache --png") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/cache --blob") COMPREPLY=(); return ;;
        "/top -i"|"/top --interval") COMPREPLY=(); return ;;
        "/top -n"|"/top --turns") COMPREPLY=(); return ;;
        "/trace -m"|"/trace --mountpoint") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/bugreport -o"|"/bugreport --output") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    case "$path" in
        '') COMPREPLY=($(compgen -W '-h --help -S --sock -V --version -r --raw set metrics list info mount umount cache workers top trace bugreport' -- "$cur")) ;;
        '/set') COMPREPLY=($(compgen -W '-h --help -r --raw log-level' -- "$cur")) ;;
        '/set/log-level') COMPREPLY=($(compgen -W '-h --help -r --raw off error warn info debug trace' -- "$cur")) ;;
        '/metrics') COMPREPLY=($(compgen -W '-h --help -r --raw backend cache fsstats' -- "$cur")) ;;
        '/metrics/backend') COMPREPLY=($(compgen -W '-h --help -r --raw -m --mountpoint -I --interval' -- "$cur")) ;;
        '/metrics/cache') COMPREPLY=($(compgen -W '-h --help -r --raw -m --mountpoint' -- "$cur")) ;;
        '/metrics/fsstats') COMPREPLY=($(compgen -W '-h --help -r --raw -m --mountpoint' -- "$cur")) ;;
        '/list') COMPREPLY=($(compgen -W '-h --help -r --raw' -- "$cur")) ;;
        '/info') COMPREPLY=($(compgen -W '-h --help -r --raw' -- "$cur")) ;;
        '/mount') COMPREPLY=($(compgen -W '-h --help -r --raw -s --source -c --config -m --mountpoint -t --type' -- "$cur")) ;;
        '/umount') COMPREPLY=($(compgen -W '-h --help -r --raw -m --mountpoint' -- "$cur")) ;;
        '/cache') COMPREPLY=($(compgen -W '-h --help -r --raw --to --map --png --blob gc' -- "$cur")) ;;
        '/workers') COMPREPLY=($(compgen -W '-h --help -r --raw upgrade scale' -- "$cur")) ;;
        '/top') COMPREPLY=($(compgen -W '-h --help -r --raw -i --interval -n --turns' -- "$cur")) ;;
        '/trace') COMPREPLY=($(compgen -W '-h --help -r --raw -m --mountpoint --prefetch-list --prefetch-ranges' -- "$cur")) ;;
        '/bugreport') COMPREPLY=($(compgen -W '-h --help -r --raw -o --output' -- "$cur")) ;;
    esac
}
complete -F _nydusctl nydusctl

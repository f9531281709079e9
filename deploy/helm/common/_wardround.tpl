{{- /* What the three charts share. The source is deploy/helm/common; `make charts` copies it into each chart. */ -}}

{{- define "wardround.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "wardround.labels" -}}
{{ include "wardround.selector" . }}
app.kubernetes.io/part-of: wardround
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* (dict "image" VALUES "tag" DEFAULT) */ -}}
{{- define "wardround.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end -}}
{{- end }}

{{- /* Requests = limits: Guaranteed QoS, so nothing of this pod is swapped out or evicted first. */ -}}
{{- define "wardround.resources" -}}
requests: &amounts
  cpu: {{ .cpu | toString | quote }}
  memory: {{ .memory | quote }}
  ephemeral-storage: {{ .ephemeralStorage | quote }}
limits: *amounts
{{- end }}

{{- define "wardround.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with .Values.security.user }}
  runAsUser: {{ int64 . }}
  runAsGroup: {{ int64 . }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  {{- with .Values.security.groups }}
  supplementalGroups: {{ toJson . }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "wardround.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{- /* The configuration that every role has: what the site chose, and the paths that this chart mounts. */ -}}
{{- define "wardround.config" -}}
{{- $chosen := dict }}
{{- range $key, $value := .Values.config }}
{{- if not (and (kindIs "string" $value) (empty $value)) }}{{ $_ := set $chosen $key $value }}{{ end }}
{{- end }}
{{- mergeOverwrite $chosen (fromYaml (include "wardround.paths" .)) (fromYaml (include "chart.config" .)) | toYaml }}
{{- end }}

{{- define "wardround.paths" -}}
charters: [/etc/wardround/documents/charter.yaml, /etc/wardround/documents/charter-next.yaml]
pins: /etc/wardround/documents/pin.yaml
identity_key: /etc/wardround/keys/identity.pem
tls: {certificate: /etc/wardround/keys/tls.pem, key: /etc/wardround/keys/tls-key.pem}
state: /var/lib/wardround/state
http: 0.0.0.0:9464
{{- end }}

{{- /* Mounts of the service and of its check; the documents' volume is followed while the service runs. */ -}}
{{- define "wardround.mounts" -}}
- {name: config, mountPath: /etc/wardround/config, readOnly: true}
- {name: documents, mountPath: /etc/wardround/documents, readOnly: true}
- {name: keys, mountPath: /etc/wardround/keys, readOnly: true}
- {name: state, mountPath: /var/lib/wardround}
- {name: scratch, mountPath: /tmp}
{{- end }}

{{- define "wardround.volumes" -}}
- name: config
  configMap: {name: {{ .Release.Name }}-config}
- name: documents
  configMap: {name: {{ .Release.Name }}-documents}
- name: keys
  projected:
    defaultMode: 288  # 0440
    sources:
      - secret:
          name: {{ include "wardround.secretName" . }}
          items: [{key: identity.pem, path: identity.pem}]
      - secret:
          {{- if .Values.tls.certManager.enabled }}
          name: {{ .Release.Name }}-tls
          items: [{key: tls.crt, path: tls.pem}, {key: tls.key, path: tls-key.pem}]
          {{- else }}
          name: {{ include "wardround.secretName" . }}
          items: [{key: tls.pem, path: tls.pem}, {key: tls-key.pem, path: tls-key.pem}]
          {{- end }}
- name: scratch
  emptyDir: {}
{{- end }}

{{- /* The name that `wardround site init` gives its manifest. */ -}}
{{- define "wardround.secretName" -}}
{{ .Values.secretName | default (printf "wardround-%s" .Values.config.id) }}
{{- end }}

{{- /* One word of the charter: (dict "root" . "key" "consortium") */ -}}
{{- define "wardround.charterWord" -}}
{{- get (fromYaml .root.Values.charter) .key | default "" -}}
{{- end }}

{{- /* Refusals at the earliest place that can know, each with its next step. */ -}}
{{- define "wardround.validate" -}}
{{- if gt (len .Release.Name) 45 }}
{{- fail (printf "the release name %s has %d characters: choose one of at most 45" .Release.Name (len .Release.Name)) }}
{{- end }}
{{- if not .Values.config.id }}{{ fail "config.id is empty: set this site's id, as the charter lists it" }}{{ end }}
{{- if not .Values.charter }}{{ fail "charter is empty: add --set-file charter=charter.yaml" }}{{ end }}
{{- if not .Values.pin }}
{{- fail "pin is empty: add --set-file pin=pin.yaml, the file that `wardround charter verify` wrote" }}
{{- end }}
{{- $pin := fromYaml .Values.pin }}
{{- $held := sha256sum .Values.charter }}
{{- if ne $held (toString $pin.current) }}
{{- fail (printf "charter has SHA-256 %s, pin.current is %v: give the charter that was verified, or run `wardround charter verify` on this one and give its pin" $held $pin.current) }}
{{- end }}
{{- if .Values.charterNext }}
{{- $next := sha256sum .Values.charterNext }}
{{- if ne $next (toString $pin.next) }}
{{- fail (printf "charterNext has SHA-256 %s, pin.next is %v: run `wardround charter verify` on it and give its pin" $next $pin.next) }}
{{- end }}
{{- end }}
{{- include "wardround.listed" . }}
{{- include "wardround.present" (dict "root" . "kind" "Secret" "name" (include "wardround.secretName" .) "step" "run `wardround site init` and kubectl apply -f secret.yaml first, or set secretName") }}
{{- include "wardround.secretKeys" . }}
{{- if and .Values.networkPolicy.enabled .Values.metrics.monitor.enabled (not .Values.metrics.from) }}
{{- fail "metrics.monitor.enabled needs metrics.from: say which pods may scrape, or the network policy stops Prometheus" }}
{{- end }}
{{- include "chart.validate" . }}
{{- end }}

{{- /* The charter must list this site in this role. A name that YAML 1.1 takes for a truth value (no, on) is let through. */ -}}
{{- define "wardround.listed" -}}
{{- $role := include "chart.role" . }}
{{- $charter := fromYaml .Values.charter }}
{{- $members := get $charter (printf "%ss" $role) | default list }}
{{- if eq $role "aggregator" }}{{ $members = list ($charter.aggregator | default dict) }}{{ end }}
{{- $listed := list }}
{{- range $members }}{{ $listed = append $listed (kindIs "bool" .id | ternary $.Values.config.id (toString .id)) }}{{ end }}
{{- if not (has .Values.config.id $listed) }}
{{- fail (printf "the charter lists no %s called %s (but %s): correct config.id, or give the charter that lists it" $role .Values.config.id (join ", " $listed)) }}
{{- end }}
{{- end }}

{{- /* Whether a cluster answers: every namespace has this ConfigMap; `helm template` sees none. */ -}}
{{- define "wardround.live" -}}
{{- if lookup "v1" "ConfigMap" .Release.Namespace "kube-root-ca.crt" }}yes{{ end }}
{{- end }}

{{- define "wardround.present" -}}
{{- if include "wardround.live" .root }}
{{- if not (lookup "v1" .kind .root.Release.Namespace .name) }}
{{- fail (printf "namespace %s has no %s %s: %s" .root.Release.Namespace .kind .name .step) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "wardround.secretKeys" -}}
{{- if include "wardround.live" . }}
{{- $name := include "wardround.secretName" . }}
{{- $held := (lookup "v1" "Secret" .Release.Namespace $name).data | default dict }}
{{- range (.Values.tls.certManager.enabled | ternary (list "identity.pem") (list "identity.pem" "tls.pem" "tls-key.pem")) }}
{{- if not (hasKey $held .) }}
{{- fail (printf "Secret %s has no key %s: make it anew with `wardround site init`, and kubectl apply -f secret.yaml" $name .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "wardround.notes" -}}
Network: {{ if .Values.networkPolicy.enabled -}}
denied, but for {{ include "chart.open" . }}; scrapers: {{ if .Values.metrics.from }}as metrics.from says{{ else }}none{{ end }}.
{{- else -}}
NOT restricted by this chart (networkPolicy.enabled is false).
{{- end }}
{{- if .Values.metrics.monitor.enabled }}
{{- if not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PodMonitor") }}
metrics.monitor is on, but this cluster does not know PodMonitor: it was left out.
{{- end }}
{{- end }}
{{- if .Values.metrics.rules.enabled }}
{{- if not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PrometheusRule") }}
metrics.rules is on, but this cluster does not know PrometheusRule: it was left out.
{{- end }}
{{- end }}
{{- if .Values.pdb.blockDrains }}
A drain of its node waits for a person: pdb.blockDrains is on.
{{- end }}
`helm uninstall` keeps the claim state-{{ .Release.Name }}-0 with {{ include "chart.kept" . }}; delete it by hand only when that is meant.
{{- end }}
